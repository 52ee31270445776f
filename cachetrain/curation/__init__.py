"""Puts a folder of images and captions in order: lists of captions, tags, faults of files, pages to look at."""

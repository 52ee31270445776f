"""Reads the files of a run and writes them as one HTML page. Imports no torch."""

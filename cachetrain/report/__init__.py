"""What a run's output_dir tells, as one HTML page (reads only files, imports no torch)."""

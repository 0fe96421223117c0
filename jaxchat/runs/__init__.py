"""What a run leaves behind: its directory, metrics, progress and report."""

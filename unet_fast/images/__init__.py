"""Images and labels in files and folders."""

"""What people and files are told."""

"""What is built on the methods and the loop. Run from the project's folder: python -m
tools.NAME."""

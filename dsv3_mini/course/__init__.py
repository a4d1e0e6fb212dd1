"""The course's machinery: lessons are written once, in solutions/*.py, and built from there."""

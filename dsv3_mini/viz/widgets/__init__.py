"""Widgets: thin controls around the pure figures of `viz/figures`."""

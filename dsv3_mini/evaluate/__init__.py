"""Measuring a model: bits per byte, and judged samples."""

"""Pictures: `style` is the house's look, `figures` turns data into matplotlib figures and does nothing else."""

"""Text to batches: corpora, tokenizer, fill-in-the-middle and packing, through Hugging Face datasets."""

"""Other people's formats, in and out: tokenizers and Hugging Face weights."""

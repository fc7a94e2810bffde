"""Other libraries' formats: language models of Hugging Face, and GGUF files."""

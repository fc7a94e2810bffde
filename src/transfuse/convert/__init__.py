"""Other libraries' formats: Hugging Face's Llama and Chameleon."""

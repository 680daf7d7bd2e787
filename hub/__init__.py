"""The package as a kernel for the Hugging Face Hub."""

"""Pure tensor functions, each with a slow twin in the tests."""

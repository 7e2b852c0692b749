"""Shipped fakes: small models and contexts for tests of lmray and of what is built on it."""

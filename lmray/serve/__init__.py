"""The gateway: OpenAI's chat protocol over any engine. Knows tokens and text, and nothing of Ray."""

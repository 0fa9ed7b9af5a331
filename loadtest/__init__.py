"""Load for any OpenAI-compatible server, and what it does to latency. Never imports `service`."""

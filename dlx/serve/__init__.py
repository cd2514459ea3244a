"""The shop front: an OpenAI-compatible server over one engine. Only here are FastAPI and uvicorn imported."""

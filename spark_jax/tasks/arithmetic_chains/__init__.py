"""The embedded world: arithmetic chains modulo ten, with a generator and a verifier that err."""

"""One ml_collections file per experiment, each with its command and expected result on top."""

"""Word lists and sentence patterns of the synthetic examples, one text file per language (see ``synthesize``)."""

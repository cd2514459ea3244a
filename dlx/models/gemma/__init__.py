"""DiffusionGemma: an encoder and a decoder of one set of weights. Text only: the vision tower is not loaded."""

"""Files to modules: checkpoints in every published layout, recognised and checked."""

"""The main job on real input: a small trained video model, calibrated, sparsified, quantised and compared (`paro demo`)."""

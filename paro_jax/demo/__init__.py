"""The main job on real input (`paro demo`): a small trained video model, calibrated, quantised and compared."""

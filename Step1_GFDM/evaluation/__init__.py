"""How good imagined futures are: figures that `Step1_GFDM.eval` reports. No training imports this package
but for the peak signal-to-noise ratio in its previews."""

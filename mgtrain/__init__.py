"""mgtrain trains video classifiers several times faster with the multigrid method (Wu et al., CVPR 2020)."""

__version__ = "0.1.0"

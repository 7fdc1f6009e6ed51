"""Numerics on matrices and spectra; knows no files and no models."""

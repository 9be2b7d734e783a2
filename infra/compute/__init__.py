"""Compute: devices and numerics, Ray workers, data-parallel ranks, compilation. Only this package imports Ray."""

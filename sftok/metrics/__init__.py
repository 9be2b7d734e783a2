"""Metrics of images and codes: PSNR, SSIM, FID, KID, precision and recall, under named protocols.

`functional` and `frechet` are pure functions, `protocols` names protocols, `measure` applies one.
"""

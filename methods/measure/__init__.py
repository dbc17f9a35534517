"""How close two runs are: errors, PSNR, SSIM."""

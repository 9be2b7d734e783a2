"""Images to codes and back, and how good the images are."""

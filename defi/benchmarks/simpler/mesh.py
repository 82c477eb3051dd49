"""Convex parts of a collision mesh, as SAPIEN 2 found them: the connected pieces of each object in the file.

SAPIEN 3 takes each named object whole: of a spoon of four pieces that makes one lump, nearly twice as heavy.
"""

from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from defi.errors import reading


def convex_parts(file: Path) -> list[np.ndarray]:
    """Of a Wavefront OBJ: the corners of each piece, float32 [n, 3], each place once.

    Raises:
        UserError: the file is missing or damaged.
    """
    corners: list[list[str]] = []
    objects: list[list[list[int]]] = [[]]  # faces
    with reading(file, "fetch SimplerEnv again"), file.open() as lines:
        for line in lines:
            kind, *words = line.split() or [""]
            if kind == "v":
                corners.append(words[:3])
            elif kind == "o":
                objects.append([])
            elif kind == "f":
                objects[-1].append([int(word.split("/")[0]) - 1 for word in words])
        places = np.array(corners, np.float32)
        return [part for faces in objects if faces for part in _pieces(places, faces)]


def _pieces(places: np.ndarray, faces: list[list[int]]) -> list[np.ndarray]:
    edges = np.array([pair for face in faces for pair in zip(face, face[1:])])
    used, edges = np.unique(edges, return_inverse=True)
    _, first, same = np.unique(places[used], axis=0, return_index=True, return_inverse=True)
    edges = first[same.reshape(-1)[edges.reshape(-1, 2)]]  # corners at one place are one
    size = len(used)
    _, piece = connected_components(coo_matrix((np.ones(len(edges)), edges.T), (size, size)), directed=False)
    first = np.sort(first)  # in the file's order
    return [places[used[first[piece[first] == each]]] for each in dict.fromkeys(piece[first])]

"""Beam codebooks of a uniform rectangular array, in the element order of Sionna's PanelArray.

Axis legend: R rows, C columns of the array; A = R*C elements; N beams.
Element order: `PanelArray` numbers elements *column first* (TR 38.901 clause 7.3 panel, index = row + column*R, row 0 on
top). A codebook flattened row first addresses the wrong elements and costs about 2 dB of beamforming gain without any
error message, so every codebook here is built by `_flatten` and a test holds the gain.
"""

import numpy as np


def _flatten(weights_NRC: np.ndarray) -> np.ndarray:
    """[N, R, C] → [N, A] in PanelArray order (column first)."""
    return weights_NRC.transpose(0, 2, 1).reshape(weights_NRC.shape[0], -1).astype(np.complex64)


def steered_beams(rows: int, cols: int, sub_rows: int, sub_cols: int, v_points: np.ndarray, h_points: np.ndarray) -> np.ndarray:
    """Beams of the centred `sub_rows` x `sub_cols` sub-array, steered to every pair of spatial frequencies.

    :param v_points: vertical phase steps in cycles per element, downwards positive
    :param h_points: horizontal phase steps in cycles per element
    :returns: complex64 [len(v_points) * len(h_points), rows * cols], beam = v * len(h_points) + h. Every beam has unit
        norm, so all beams radiate the same total power whatever the size of the sub-array. Received RSRP of beam n for a
        channel h in PanelArray order is |h @ beams[n]|^2.
    """
    if not (0 < sub_rows <= rows and 0 < sub_cols <= cols):
        raise ValueError(f"sub-array {sub_rows}x{sub_cols} does not fit into the array {rows}x{cols}")
    row0, col0 = (rows - sub_rows) // 2, (cols - sub_cols) // 2
    # The conjugate matches the array response exp(+j 2 pi r.d/lambda) of TR 38.901 eq. 7.5-22.
    vertical = np.exp(-2j * np.pi * np.outer(v_points, np.arange(sub_rows)))
    horizontal = np.exp(-2j * np.pi * np.outer(h_points, np.arange(sub_cols)))
    weights = np.zeros((len(v_points), len(h_points), rows, cols), np.complex128)
    weights[:, :, row0 : row0 + sub_rows, col0 : col0 + sub_cols] = (
        vertical[:, None, :, None] * horizontal[None, :, None, :] / np.sqrt(sub_rows * sub_cols)
    )
    return _flatten(weights.reshape(-1, rows, cols))


def dft_codebook(rows: int, cols: int) -> np.ndarray:
    """The rows*cols orthogonal DFT beams of the whole array (TS 38.214 clause 5.2.2.2.1 without oversampling).

    :returns: complex64 [rows*cols, rows*cols]; beam = m_v * cols + m_h points at spatial frequency (m_v/rows, m_h/cols)
        cycles per element. Indices wrap: beam m_h = cols-1 is the neighbour of m_h = 0.
    """
    return steered_beams(rows, cols, rows, cols, np.arange(rows) / rows, np.arange(cols) / cols)


def wide_beams(rows: int, cols: int, sub_rows: int, sub_cols: int) -> np.ndarray:
    """Wide SSB beams: the DFT beams of a sub-array, at the same total power as a narrow beam.

    :returns: complex64 [sub_rows*sub_cols, rows*cols]; beam = k_v * sub_cols + k_h. Where sub_rows divides rows and
        sub_cols divides cols, wide beam (k_v, k_h) points exactly where narrow beam (k_v*rows/sub_rows,
        k_h*cols/sub_cols) does.
    """
    return steered_beams(rows, cols, sub_rows, sub_cols, np.arange(sub_rows) / sub_rows, np.arange(sub_cols) / sub_cols)


def parent_beams(rows: int, cols: int, parents_v: int, parents_h: int) -> tuple[np.ndarray, np.ndarray]:
    """First stage of a two-stage beam search: each parent covers one block of adjacent narrow beams.

    The parent is steered to the middle of its block, not to one of the DFT points, so that the outermost children
    lose equally (the hierarchical codebook of Alkhateeb et al., IEEE JSTSP 2014, realised with a sub-array).

    :returns: (parents complex64 [P, rows*cols], children int64 [P, rows*cols/P] indices into `dft_codebook`)
    """
    if rows % parents_v or cols % parents_h:
        raise ValueError(f"{parents_v}x{parents_h} parents do not divide the {rows}x{cols} narrow beams")
    block_v, block_h = rows // parents_v, cols // parents_h
    v_points = (np.arange(parents_v) * block_v + (block_v - 1) / 2) / rows
    h_points = (np.arange(parents_h) * block_h + (block_h - 1) / 2) / cols
    parents = steered_beams(rows, cols, parents_v, parents_h, v_points, h_points)
    index = np.arange(rows * cols).reshape(parents_v, block_v, parents_h, block_h)
    return parents, index.transpose(0, 2, 1, 3).reshape(parents_v * parents_h, block_v * block_h)

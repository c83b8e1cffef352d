"""One picture as slides of several formats: a pyramid, OME-TIFF, DICOM, NDPI, flat images, and a huge sparse TIFF."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from test.support.pyramids import pyramid, write_slide


def ome_tiff(file: Path, pixels: np.ndarray) -> Path:
    """As bfconvert and QuPath write it: smaller levels in SubIFDs, um/px in OME-XML and in the resolution tags."""
    levels = pyramid(pixels)
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(file, ome=True) as tiff:
        unit = {"resolution": (1e4 / 0.25, 1e4 / 0.25), "resolutionunit": "CENTIMETER"}
        about = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
        tiff.write(levels[0], subifds=len(levels) - 1, metadata=about, **options, **unit)  # type: ignore[arg-type]
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, **options)  # type: ignore[arg-type]
    return file


def dicom(file: Path, pixels: np.ndarray, side: int = 256) -> Path:
    """VL Whole Slide Microscopy, TILED_FULL, uncompressed; after DICOM PS3.3 A.32.8 and what OpenSlide 4 asks for."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

    height, width = pixels.shape[:2]
    rows, columns = -(-height // side), -(-width // side)
    padded = np.pad(pixels, ((0, rows * side - height), (0, columns * side - width), (0, 0)))
    tiles = padded.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = Dataset()
    image.file_meta = meta
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.StudyInstanceUID, image.SeriesInstanceUID = generate_uid(), generate_uid()
    image.FrameOfReferenceUID = generate_uid()
    image.Modality, image.Manufacturer = "SM", "generated"
    image.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    image.DimensionOrganizationType = "TILED_FULL"
    image.TotalPixelMatrixColumns, image.TotalPixelMatrixRows = width, height
    image.Rows = image.Columns = side
    image.NumberOfFrames = rows * columns
    image.SamplesPerPixel, image.PlanarConfiguration, image.PhotometricInterpretation = 3, 0, "RGB"
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit, image.PixelRepresentation = 7, 0
    measures = Dataset()
    measures.PixelSpacing = [0.00025, 0.00025]  # mm
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    image.SharedFunctionalGroupsSequence = [shared]
    image.PixelData = tiles.tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(file, enforce_file_format=True)
    return file


def ndpi(file: Path, pixels: np.ndarray, away: tuple[int, int] = (0, 0), lens: float = 40) -> Path:
    """Hamamatsu's NDPI, one level: little-endian TIFF with 64-bit offsets of directories, and a JPEG as its only strip.

    away: how far the middle of the picture is from the middle of the glass slide, in nm. After OpenSlide's reader.
    """
    height, width = pixels.shape[:2]
    strip, software = io.BytesIO(), b"NDP.scan 3.2\0\0\0\0"
    Image.fromarray(pixels).save(strip, "JPEG", quality=95, subsampling=0)
    jpeg = strip.getvalue()
    start, texts = 16, 16 + len(jpeg)
    resolution = texts + len(software)
    tags = [  # number, type (3: short, 4: long, 9: signed long, 11: float), count, value or offset
        (256, 4, 1, struct.pack("<I", width)),
        (257, 4, 1, struct.pack("<I", height)),
        (259, 3, 1, struct.pack("<I", 7)),
        (273, 4, 1, struct.pack("<I", start)),
        (279, 4, 1, struct.pack("<I", len(jpeg))),
        (282, 5, 1, struct.pack("<I", resolution)),
        (283, 5, 1, struct.pack("<I", resolution)),
        (296, 3, 1, struct.pack("<I", 3)),
        (305, 2, len(software), struct.pack("<I", texts)),
        (65420, 4, 1, struct.pack("<I", 1)),
        (65421, 11, 1, struct.pack("<f", lens)),
        (65422, 9, 1, struct.pack("<i", away[0])),
        (65423, 9, 1, struct.pack("<i", away[1])),
        (65424, 9, 1, struct.pack("<i", 0)),
    ]
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    header = b"II*\0" + struct.pack("<Q", resolution + 8) + bytes(4)
    directory = struct.pack("<H", len(tags)) + entries + bytes(8 + 4 * len(tags))  # none follows; high halves of values
    file.write_bytes(header + jpeg + software + struct.pack("<II", 40000, 1) + directory)  # pixels per cm: 0.25 um/px
    return file


def flat(file: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(file)
    return file


def plain_tiff(file: Path, pixels: np.ndarray) -> Path:
    return write_slide(file, [pixels])


def huge(file: Path, side: int, figures: dict[tuple[int, int], np.ndarray], tile: int = 256) -> Path:
    """side x side pixels of which only the tiles with figures are stored; OpenSlide reads missing ones as black."""
    blank = np.full((tile, tile, 3), 240, np.uint8)
    tiles: dict[tuple[int, int], np.ndarray] = {(0, 0): blank.copy()}  # the first one tells tifffile shape and type
    for (x, y), picture in figures.items():
        half = len(picture) // 2
        for row in range((y - half) // tile, (y + half - 1) // tile + 1):
            for column in range((x - half) // tile, (x + half - 1) // tile + 1):
                into = tiles.setdefault((row, column), blank.copy())
                top, left = y - half - row * tile, x - half - column * tile
                rows = slice(max(top, 0), min(top + 2 * half, tile))
                columns = slice(max(left, 0), min(left + 2 * half, tile))
                part = picture[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
                into[rows, columns] = part
    count = -(-side // tile)
    everything = (tiles.get((row, column)) for row in range(count) for column in range(count))
    with tifffile.TiffWriter(file, bigtiff=True) as tiff:
        tiff.write(
            everything,
            shape=(side, side, 3),
            dtype=np.uint8,
            tile=(tile, tile),
            photometric="rgb",
            compression="zlib",
            resolution=(1e4 / 0.25, 1e4 / 0.25),
            resolutionunit="CENTIMETER",
            metadata=None,
        )
    return file

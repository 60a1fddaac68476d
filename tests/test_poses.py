"""Cameras and rays: matrices by hand, numpy's sines, and that a change of the world's frame changes nothing."""

import math

import numpy as np
import pytest
import torch

from glocal.poses import RayEncoding, Rays, camera_centres, octaves, to_cameras


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def motions(*lead):
    """Random rigid motions ``(*lead, 4, 4)``."""
    turn = torch.linalg.qr(random(*lead, 3, 3))[0]
    turn[..., 0] *= torch.linalg.det(turn)[..., None]
    out = torch.eye(4, dtype=torch.float64).repeat(*lead, 1, 1)
    out[..., :3, :3], out[..., :3, 3] = turn, random(*lead, 3)
    return out


def units(*lead):
    return torch.nn.functional.normalize(random(*lead, 3), dim=-1)


def moved(motion, cameras, rays):
    """What is in the world, ``motion (B, 4, 4)`` later, and the cameras that see it as before."""
    turn, shift = motion[:, :3, :3], motion[:, :3, 3]
    return cameras @ motion.inverse()[:, None], Rays(rays.origins @ turn.mT + shift[:, None], rays.directions @ turn.mT)


def test_octaves_against_numpy():
    x = random(2, 5, 3)
    found = octaves(x, 4, -2)
    assert found.shape == (2, 5, 24)
    for c in range(3):
        for s in range(4):
            angle = math.pi * 2.0 ** (s - 2) * x[..., c].numpy()
            np.testing.assert_allclose(found[..., 4 * c + s], np.sin(angle), atol=1e-12)
            np.testing.assert_allclose(found[..., 12 + 4 * c + s], np.cos(angle), atol=1e-12)


def test_rays_in_cameras_by_loop():
    cameras, rays = motions(2, 3), Rays(random(2, 5, 3), units(2, 5))
    found = to_cameras(cameras, rays)
    for b in range(2):
        for v in range(3):
            for n in range(5):
                point = cameras[b, v] @ torch.cat([rays.origins[b, n], torch.ones(1)])
                way = cameras[b, v] @ torch.cat([rays.directions[b, n], torch.zeros(1)])
                torch.testing.assert_close(found.origins[b, v, n], point[:3])
                torch.testing.assert_close(found.directions[b, v, n], way[:3])


def test_a_camera_sees_its_centre_at_zero():
    cameras = motions(2, 3)
    centres = camera_centres(cameras)
    seen = cameras @ torch.cat([centres, torch.ones(2, 3, 1)], -1)[..., None]
    torch.testing.assert_close(seen[..., :3, 0], torch.zeros(2, 3, 3, dtype=torch.float64))


def test_sizes_and_order_of_an_encoding():
    rays = Rays(random(2, 7, 3), units(2, 7))
    found = RayEncoding()(rays)
    assert found.shape == (2, 7, RayEncoding().channels) == (2, 7, 180)
    torch.testing.assert_close(found[..., :90], octaves(rays.origins, 15, -5))
    torch.testing.assert_close(found[..., 90:], octaves(rays.directions, 15, 0))


def test_poses_of_keys_and_queries():
    encoding, cameras, directions = RayEncoding(3, -1, 2), motions(2, 3), units(2, 3, 4)
    poses = encoding.relative(cameras, directions)
    for v in range(3):
        turn = cameras[:, v, :3, :3]
        zero = torch.zeros(2, 4, 3, dtype=torch.float64)
        own = encoding(Rays(zero, directions[:, v] @ turn.mT))
        torch.testing.assert_close(poses.keys[:, v], own)
        # What belongs to a camera is in its frame what it is as a key.
        torch.testing.assert_close(poses.queries[:, v, 4 * v : 4 * v + 4], own)
    rays = Rays(random(2, 5, 3), units(2, 5))
    given = encoding.relative(cameras, directions, rays)
    torch.testing.assert_close(given.queries, encoding(to_cameras(cameras, rays)))
    torch.testing.assert_close(given.keys, poses.keys)


def test_the_worlds_frame_does_not_count():
    torch.manual_seed(0)
    cameras, directions, rays = motions(2, 3), units(2, 3, 4), Rays(random(2, 5, 3), units(2, 5))
    motion = motions(2)
    others, turned = moved(motion, cameras, rays)
    ways = (directions.flatten(1, 2) @ motion[:, :3, :3].mT).view_as(directions)
    for queries, later in ((rays, turned), (None, None)):
        one, other = RayEncoding().relative(cameras, directions, queries), RayEncoding().relative(others, ways, later)
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
    # In float32 with few octaves.
    few = RayEncoding(6, -3, 4)
    one = few.relative(cameras.float(), directions.float(), Rays(*(t.float() for t in rays)))
    other = few.relative(others.float(), ways.float(), Rays(*(t.float() for t in turned)))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_halves_are_encoded_in_float32():
    rays = Rays(torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16())
    assert torch.equal(RayEncoding()(rays), RayEncoding()(Rays(*(t.float() for t in rays))))
    with torch.autocast("cpu", torch.bfloat16):
        cameras, directions = motions(1, 2).float(), units(1, 2, 3).float()
        found = RayEncoding(4, 0, 4).relative(cameras, directions)
    wanted = RayEncoding(4, 0, 4).relative(cameras.double(), directions.double())
    torch.testing.assert_close(found.queries, wanted.queries.float(), atol=1e-4, rtol=0)


def test_gradients_reach_cameras_and_rays():
    def encode(cameras, directions, origins):
        return RayEncoding(2, -1, 2).relative(cameras, directions, Rays(origins, directions[:, 0]))

    inputs = [t.requires_grad_() for t in (motions(1, 2), units(1, 2, 3), random(1, 3, 3))]
    assert torch.autograd.gradcheck(encode, inputs)


def test_bad_input():
    with pytest.raises(ValueError, match="origin_octaves and direction_octaves must be at least 1; they were 0 and 15"):
        RayEncoding(0)
    with pytest.raises(ValueError, match=r"cameras must be \(\.\.\., 4, 4\)"):
        camera_centres(torch.eye(3))
    with pytest.raises(ValueError, match=r"cameras must be \(B, V, 4, 4\)"):
        to_cameras(torch.eye(4)[None], Rays(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))
    with pytest.raises(ValueError, match=r"directions of rays must be \(1, N, 3\)"):
        to_cameras(torch.eye(4)[None, None], Rays(torch.zeros(1, 2, 3), torch.zeros(2, 2, 3)))
    with pytest.raises(ValueError, match=r"directions must be \(1, 2, L, 3\)"):
        RayEncoding().relative(torch.eye(4).expand(1, 2, 4, 4), torch.zeros(1, 3, 2, 3))

"""What one node and the server do for masks in Flower's SecAgg+, by its own functions, over a complete graph.

For `atoll bench privacy --beside "PYTHON benchmarks/flower_secagg.py"`, where PYTHON has flwr installed (1.42 was measured).
Arguments: nodes, parameters, lost nodes, threshold, clock. Prints one line of JSON. The steps are those of
`flwr.client.mod.secure_aggregation.secaggplus_mod` and `flwr.server.workflow.secure_aggregation.secaggplus_workflow`, without
their messages.
"""

import json
import os
import sys
import time

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod, parameters_subtraction
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

now = time.process_time if sys.argv[5:] == ["processor"] else time.perf_counter
CLIP, TARGET, MODULUS = 8.0, 1 << 22, 1 << 32  # Flower's defaults


def node(keys, parameters, threshold):
    """Return the seconds of one node's work: all of it, and of its masks."""
    began = now()
    (ours, _), (for_shares, _) = generate_key_pairs(), generate_key_pairs()
    seed = os.urandom(32)
    seeds = create_shares(seed, threshold, len(keys))
    secrets = create_shares(private_key_to_bytes(ours), threshold, len(keys))
    shared = [generate_shared_key(for_shares, public) for _, public in keys[1:]]
    sealed = [
        encrypt(key, share_keys_plaintext_concat(0, other, seeds[other], secrets[other])) for other, key in enumerate(shared, 1)
    ]
    for key, one in zip(shared, sealed, strict=True):
        share_keys_plaintext_separate(decrypt(key, one))
    update = [np.array([1]), *quantize([np.full(parameters, 0.01, np.float32)], CLIP, TARGET)]
    shapes = [part.shape for part in update]
    masking = now()
    update = parameters_addition(update, pseudo_rand_gen(seed, MODULUS, shapes))
    for other, (_, public) in enumerate(keys[1:]):
        mask = pseudo_rand_gen(generate_shared_key(ours, public), MODULUS, shapes)
        update = (parameters_addition if other % 2 else parameters_subtraction)(update, mask)
    parameters_mod(update, MODULUS)
    end = now()
    return end - began, end - masking


def server(keys, parameters, lost, threshold):
    """Return the seconds of unmasking a sum of which `lost` nodes are missing."""
    seeds = [create_shares(os.urandom(32), threshold, len(keys))[:threshold] for _ in keys]
    total = [np.array([1]), np.zeros(parameters, np.int64)]
    shapes = [part.shape for part in total]
    began = now()
    for place, shares in enumerate(seeds):
        secret = combine_shares(shares)
        if place >= lost:
            total = parameters_subtraction(total, pseudo_rand_gen(secret, MODULUS, shapes))
            continue
        for other, (_, public) in enumerate(keys):
            if other >= lost:
                mask = pseudo_rand_gen(generate_shared_key(keys[place][0], public), MODULUS, shapes)
                total = parameters_addition(total, mask)
    parameters_mod(total, MODULUS)
    return now() - began


def main():
    nodes, parameters, lost, threshold = map(int, sys.argv[1:5])
    keys = [generate_key_pairs() for _ in range(nodes)]
    tries = [node(keys, parameters, threshold) for _ in range(5)]
    row = {
        "guard": "Flower SecAgg+",
        "nodes": nodes,
        "parameters": parameters,
        "lost": lost,
        "seconds": min(whole for whole, _ in tries),
        "mask_seconds": min(masks for _, masks in tries),
        "server_seconds": server(keys, parameters, lost, threshold),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()

#!/bin/sh
# python-engineio 4.15.1, python-socketio 5.18.1: each packet that arrives makes a JSON decoder, and each that is sent an encoder.
#
# Expected: packets are decoded with a decoder that is made once, as json.loads does where it is called without options.
# Seen: engineio.json.loads passes parse_int, which makes the standard library build a decoder each time; packets are encoded with
# separators, which makes an encoder each time. For a short event, decoding takes about three times as long as with a kept decoder.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check python-socketio==5.18.1 python-engineio==4.15.1
"$folder/venv/bin/python" - <<'PYTHON'
import json
import timeit

import engineio.json
from socketio.packet import Packet

PACKETS = 1000
EVENT = '2["message","how are you?"]'
made = {"decoders": 0, "encoders": 0}


def counting(kind, init):
    def count(self, *arguments, **options):
        made[kind] += 1
        init(self, *arguments, **options)

    return count


originals = json.JSONDecoder.__init__, json.JSONEncoder.__init__
json.JSONDecoder.__init__ = counting("decoders", originals[0])
json.JSONEncoder.__init__ = counting("encoders", originals[1])
for _ in range(PACKETS):
    Packet(encoded_packet=EVENT).encode()
print(f"{PACKETS} packets decoded and encoded made {made}")
assert made == {"decoders": PACKETS, "encoders": PACKETS}, "this has changed"
made.update(decoders=0, encoders=0)
for _ in range(PACKETS):
    json.dumps(json.loads(EVENT[1:]))
print(f"json.loads and json.dumps without options made {made}")
assert made == {"decoders": 0, "encoders": 0}

json.JSONDecoder.__init__, json.JSONEncoder.__init__ = originals
kept = json.JSONDecoder(parse_int=int).decode
theirs, ours = (min(timeit.repeat(lambda: decode(EVENT[1:]), number=20_000, repeat=5)) for decode in (engineio.json.loads, kept))
print(f"engineio.json.loads takes {theirs / ours:.1f} times as long as a decoder that is kept")
PYTHON

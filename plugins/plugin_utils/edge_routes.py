"""Routes of a listener: how Envoy finds the key of a request, and what it does with the request."""

from __future__ import annotations

import json
from typing import Any

Data = dict[str, Any]

HTTPS_PORT = 443
TYPE = "type.googleapis.com/"
# Set by the edge only: the key that was hashed, the cluster whose ring it was hashed for, the client's address, which
# process of which edge passes the request on.
NODE_HEADERS = ("x-stickyring-key", "x-stickyring-cluster", "x-stickyring-client", "x-stickyring-process")
# What systemd and the hand-over (files/hand_over.py of the edge role) call a process of Envoy in its environment.
PROCESS = "%ENVIRONMENT(INVOCATION_ID)%"
# Marks a request whose key the edge has generated.
ISSUED_HEADER = "x-stickyring-issued"
# Envoy's filter state in a request: the key as the client gave it, and the key that is hashed, logged and passed on.
GIVEN, KEY = "stickyring.given", "stickyring.key"
# The filter that limits bodies, and the name of the limit in it.
BODY_FILTER, BODY_LIMIT = "stickyring.body", "limit"
# The filter that limits handshakes, how many addresses it remembers, and the bits of an IPv6 address that count.
HANDSHAKE_FILTER, ADDRESSES, IPV6_PREFIX = "stickyring.handshakes", 10_000, 64
MOST_TOKENS = 2**32 - 1
# The filter that checks tokens, the name of the check in it, where it keeps the claims, and the subject there.
TOKEN_FILTER, TOKEN_CHECK, CLAIMS = "stickyring.token", "check", "claims"
SUBJECT = f"%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:{CLAIMS}:sub)%"
# The path of Socket.IO, unless an application chooses another.
SOCKET_IO = "socket.io"
# The filter that takes the token out of the path of an ACME challenge (RFC 8555, section 8.3).
CHALLENGE_FILTER, CHALLENGE_PATH = "stickyring.cookies", r"/\.well-known/acme-challenge/([A-Za-z0-9_-]+)"
# A key is UTF-8 without control characters (C0, DEL, C1), and without a blank at either end, which headers would lose.
# Envoy matches byte by byte, hence the forms of UTF-8 (RFC 3629, section 4).
KEY_CHARACTER = (
    r"(?:[\x21-\x7e]|\xc2[\xa0-\xbf]|[\xc3-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    r"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})"
)
GOOD_KEY = f"{KEY_CHARACTER}(?: *{KEY_CHARACTER})*"
ANY_KEY = "(?s).+"
# In the form of Engine.IO's own errors, whose code 3 is a bad request.
BAD_KEY = json.dumps(
    {
        "code": 3,
        "message": "Bad request: a user id is UTF-8 without control characters, and no blank at either end",
    }
)

# How a browser asks, without the token, whether it may send one.
PREFLIGHT = [
    {"name": ":method", "string_match": {"exact": "OPTIONS"}},
    {"name": "origin", "present_match": True},
    {"name": "access-control-request-method", "present_match": True},
]
# In the form of Envoy's own answers to a request without a valid token.
NO_SUBJECT = "Jwt has no subject"


def edge_duration(seconds: float | str) -> str:
    """Seconds in the notation of Envoy's google.protobuf.Duration, the same for a number and its text."""
    return f"{float(seconds):.9f}".rstrip("0").rstrip(".") + "s"


def _given(policy: Data) -> str:
    """Envoy's substitution for the decoded value that a hash policy reads; empty if a request has none."""
    if "query_parameter" in policy:
        return f"%QUERY_PARAM({policy['query_parameter']['name']})%"
    if "header" in policy:
        return f"%REQ({policy['header']['header_name']})%"
    if "cookie" in policy:
        # Where the filter `stickyring.cookies` has put it.
        return f"%DYNAMIC_METADATA(stickyring.cookie:{policy['cookie']['name']})%"
    if "filter_state" in policy:
        return f"%FILTER_STATE({policy['filter_state']['key']}:PLAIN)%"
    if "token" in policy:
        return SUBJECT
    return "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"


def _key_filters(policies: list[Data]) -> Data:
    """Per-route settings of the filters that find the key of a request, before the route is chosen by it.

    They are in the routes because a changed listener would drop its WebSockets.
    """

    def kept(key: str, factory: str, value: str) -> Data:
        text = {"text_format_source": {"inline_string": value}, "omit_empty_values": True}
        return {"object_key": key, "factory_key": factory, "skip_if_empty": True, "format_string": text}

    # A request without a key gets a cookie, so policies after the cookie never apply.
    issued = _issued_cookie(policies)
    asked = policies[: [policy.get("cookie") for policy in policies].index(issued) + 1] if issued else policies
    # Later values overwrite earlier ones, so the first policy comes last.
    values = [kept(GIVEN, "envoy.string", _given(policy)) for policy in reversed(asked)]
    if issued:
        # Random for each request, not for each connection.
        values.append(kept(KEY, "envoy.hashable_string", "%UNIQUE_ID%"))
    values.append(kept(KEY, "envoy.hashable_string", f"%FILTER_STATE({GIVEN}:PLAIN)%"))
    rules = [
        {"cookie": name, "on_header_present": {"metadata_namespace": "stickyring.cookie", "key": name}}
        for name in (policy["cookie"]["name"] for policy in asked if "cookie" in policy)
    ]
    settings = {
        "stickyring.key": {
            "@type": TYPE + "envoy.extensions.filters.http.set_filter_state.v3.Config",
            "on_request_headers": values,
        }
    }
    if rules:
        settings["stickyring.cookies"] = {
            "@type": TYPE + "envoy.extensions.filters.http.header_to_metadata.v3.Config",
            "request_rules": rules,
        }
    return settings


def _issued_cookie(policies: list[Data]) -> Data | None:
    """The cookie for clients that give no key: the first one with a ttl, as in Envoy's own hash policies."""
    return next((policy["cookie"] for policy in policies if "ttl" in policy.get("cookie", {})), None)


def _set_cookie(cookie: Data, *, secure: bool) -> Data:
    """The response header that gives a client its generated key."""
    seconds = int(cookie["ttl"].removesuffix("s"))
    attributes = [
        f"{one['name']}={one['value']}" if one.get("value") else one["name"] for one in cookie.get("attributes", [])
    ]
    parts = [
        f"{cookie['name']}=%FILTER_STATE({KEY}:PLAIN)%",
        *([f"Max-Age={seconds}"] if seconds else []),
        *([f"Path={cookie['path']}"] if cookie.get("path") else []),
        *(["Secure"] if secure and not any(one.lower() == "secure" for one in attributes) else []),
        "HttpOnly",
        *attributes,
    ]
    return {"header": {"key": "set-cookie", "value": "; ".join(parts)}, "append_action": "APPEND_IF_EXISTS_OR_ADD"}


def _with_key(match: Data, regex: str) -> Data:
    return {**match, "filter_state": [{"key": GIVEN, "string_match": {"safe_regex": {"regex": regex}}}]}


def _chain_of(name: str, settings: Data) -> Data:
    """Per-route settings of a chain of filters, which then has this filter alone."""
    return {
        "@type": TYPE + "envoy.extensions.filters.http.filter_chain.v3.FilterChainConfigPerRoute",
        "filter_chain": {"filters": [{"name": name, "typed_config": settings}]},
    }


def _body_limit(limit: int) -> Data:
    """Per-route settings of the limit for bodies.

    They are in the routes because a changed listener would drop its WebSockets.
    """
    limit_filter = {
        "@type": TYPE + "envoy.extensions.filters.http.body_size_limit.v3.BodySizeLimit",
        "max_request_bytes": limit,
    }
    return {BODY_FILTER: _chain_of(BODY_LIMIT, limit_filter)}


def token_places(token: Data) -> Data:
    """Where a listener's `token` lets clients put it, and the paths that need one."""
    return {"query": "token", "cookie": "", "paths": [f"/{SOCKET_IO}"], **token}


def _below(path: str) -> Data:
    """Matches a path and all below it."""
    return {"prefix": "/"} if path == "/" else {"path_separated_prefix": path}


def _token_check(token: Data, keys: str) -> Data:
    """Per-route settings of the check of tokens: a JWT that one of the `keys`, a JWK Set, has signed.

    They are in the routes, so that keys change without a changed listener, which would drop its WebSockets.
    """
    places = token_places(token)
    provider = {
        "local_jwks": {"inline_string": keys},
        "from_headers": [{"name": "authorization", "value_prefix": "Bearer "}],
        **({"from_params": [places["query"]]} if places["query"] else {}),
        **({"from_cookies": [places["cookie"]]} if places["cookie"] else {}),
        **({"issuer": token["issuer"]} if token.get("issuer") else {}),
        **({"audiences": token["audiences"]} if token.get("audiences") else {}),
        # The application gets the request as it is.
        "forward": True,
        "payload_in_metadata": CLAIMS,
        "require_expiration": True,
    }
    needed = [{"match": _below(path), "requires": {"provider_name": "token"}} for path in places["paths"]]
    check = {
        "@type": TYPE + "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        "providers": {"token": provider},
        "rules": needed,
        "bypass_cors_preflight": True,
    }
    return {TOKEN_FILTER: _chain_of(TOKEN_CHECK, check)}


def _handshake_limit(limit: Data) -> Data:
    """Per-route settings of the limit for new sessions of one address; empty for none.

    They are in the routes because a changed listener would drop its WebSockets. Envoy takes nothing from the filter
    itself then, so the number of addresses, which is 20 by default, has to be here too.
    """
    if not limit["rate"]:
        return {}
    # GETs of Engine.IO without a session; an empty sid is none.
    parts = [
        {
            "header_value_match": {
                "descriptor_value": "GET",
                "headers": [{"name": ":method", "string_match": {"exact": "GET"}}],
            }
        },
        *(
            {
                "query_parameter_value_match": {
                    "descriptor_value": name,
                    "expect_match": expected,
                    "query_parameters": [{"name": name, "string_match": {"safe_regex": {"regex": "(?s).+"}}}],
                }
            }
            for name, expected in (("EIO", True), ("sid", False))
        ),
    ]
    address = {"masked_remote_address": {"v4_prefix_mask_len": 32, "v6_prefix_mask_len": IPV6_PREFIX}}
    # A value that is left out stands for any, each with tokens of its own.
    entries = [
        {"key": "header_match", "value": "GET"},
        *({"key": "query_match", "value": name} for name in ("EIO", "sid")),
        {"key": "masked_remote_address"},
    ]
    tokens = {"max_tokens": limit["burst"], "tokens_per_fill": limit["rate"], "fill_interval": "1s"}
    # For all other requests. Envoy requires it.
    enough = {"max_tokens": MOST_TOKENS, "tokens_per_fill": MOST_TOKENS, "fill_interval": "1s"}
    always = {"default_value": {"numerator": 100}}
    return {
        HANDSHAKE_FILTER: {
            "@type": TYPE + "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
            "stat_prefix": HANDSHAKE_FILTER,
            "filter_enabled": always,
            "filter_enforced": always if limit["enforced"] else {"default_value": {"numerator": 0}},
            "token_bucket": enough,
            "rate_limits": [{"actions": [*parts, address]}],
            "descriptors": [{"entries": entries, "token_bucket": tokens}],
            "max_dynamic_descriptors": ADDRESSES,
            "always_consume_default_token_bucket": False,
            "response_headers_to_add": [{"header": {"key": "retry-after", "value": "1"}}],
        }
    }


def _to_nodes(item: Data, common: Data) -> list[Data]:
    """The routes of a listener that lead to its cluster, the longest prefix first; all requests match the last one."""
    # A body is kept for a retry until it exceeds this. Envoy's own limit is the connection's buffer, far below what is
    # allowed. With the larger limit of a path, a few uploads would fill the edge's memory.
    everything = {
        "match": {"prefix": "/"},
        "route": {"cluster": item["cluster"], **common["route"]},
        "request_body_buffer_limit": common["largest_body"],
    }
    paths: list[Data] = item["paths"] if "paths" in item else common["paths"]
    special = []
    for path in sorted(paths, key=lambda path: (-len(path["prefix"]), path["prefix"])):
        route = {**everything, "match": {"path_separated_prefix": path["prefix"]}}
        if "timeout" in path:
            route["route"] = {**everything["route"], "timeout": edge_duration(path["timeout"])}
        if "body_limit" in path:
            route["typed_per_filter_config"] = _body_limit(int(path["body_limit"]))
        special.append(route)
    return [*special, everything]


def _challenge(thumbprint: str) -> Data:
    """The route that answers ACME challenges of an account, whichever edge has asked for the certificate.

    The answer is the token of the request and the thumbprint of the account's key, so no edge needs to know of another.
    """
    answer = {
        "metadata_namespace": "stickyring.acme",
        "key": "answer",
        "regex_value_rewrite": {"pattern": {"regex": f"{CHALLENGE_PATH}.*"}, "substitution": rf"\1.{thumbprint}"},
    }
    return {
        "match": {"safe_regex": {"regex": CHALLENGE_PATH}},
        "typed_per_filter_config": {
            CHALLENGE_FILTER: {
                "@type": TYPE + "envoy.extensions.filters.http.header_to_metadata.v3.Config",
                "request_rules": [{"header": ":path", "on_header_present": answer}],
            }
        },
        "direct_response": {
            "status": 200,
            "body_format": {
                "text_format_source": {"inline_string": "%DYNAMIC_METADATA(stickyring.acme:answer)%"},
                "content_type": "application/octet-stream",
            },
        },
    }


def _redirect(item: Data, common: Data) -> Data:
    """Routes that send every request to https, with the same host, path and query.

    308, because a client repeats a POST that gets a 301 as a GET, without its body.
    """
    port = int(item["redirect_port"])
    redirect = {
        "https_redirect": True,
        **({} if port == HTTPS_PORT else {"port_redirect": port}),
        "response_code": "PERMANENT_REDIRECT",
    }
    everything = {"match": {"prefix": "/"}, "redirect": redirect}
    challenges = [_challenge(common["acme_thumbprint"])] if common["acme_thumbprint"] else []
    return {
        "@type": TYPE + "envoy.config.route.v3.RouteConfiguration",
        "name": item["name"],
        "virtual_hosts": [{"name": item["name"], "domains": ["*"], "routes": [*challenges, everything]}],
    }


def routes(item: Data, common: Data, texts: dict[str, str]) -> Data:
    """The RouteConfiguration of a listener. ``texts`` has the files of edge_pem_paths."""
    if "redirect_port" in item:
        return _redirect(item, common)
    policies: list[Data] = item["hash_policies"] if "hash_policies" in item else common["hash_policies"]
    token: Data = item.get("token") or {}
    if token:
        policies = [{"token": {}}]
    resource = {
        "@type": TYPE + "envoy.config.route.v3.RouteConfiguration",
        "name": item["name"],
        **common["route_configuration"],
    }
    # Headers from the client are removed before a route adds its own.
    resource["most_specific_header_mutations_wins"] = True
    resource["request_headers_to_remove"] = [*NODE_HEADERS, ISSUED_HEADER]
    resource["request_headers_to_add"] = [
        {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for name, value in zip(
            NODE_HEADERS,
            (
                f"%FILTER_STATE({KEY}:PLAIN)%",
                item["cluster"],
                "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
                PROCESS,
            ),
            strict=True,
        )
    ]
    private = [{"match": {"path": path}, "direct_response": {"status": 404}} for path in common["private_paths"]]
    routes = _to_nodes(item, common)
    resource["typed_per_filter_config"] = _body_limit(common["largest_body"]) | _handshake_limit(common["handshakes"])
    if token:
        resource["typed_per_filter_config"] |= _token_check(token, texts[token["keys"]])
    if policies:
        resource["typed_per_filter_config"] |= _key_filters(policies)
        for route in routes:
            route["route"] = {**route["route"], "hash_policy": [{"filter_state": {"key": KEY}}]}
        cookie = _issued_cookie(policies)
        added: Data = {}
        if cookie:
            added["request_headers_to_add"] = [{"header": {"key": ISSUED_HEADER, "value": "1"}}]
            added["response_headers_to_add"] = [_set_cookie(cookie, secure="tls" in item)]
        refused = {"status": 400, "body": {"inline_string": BAD_KEY}}
        paths = token_places(token)["paths"] if token else []
        keyless = [
            *({**routes[-1], "match": {**_below(path), "headers": PREFLIGHT}} for path in paths),
            *(
                {
                    "match": _below(path),
                    "direct_response": {"status": 401, "body": {"inline_string": NO_SUBJECT}},
                }
                for path in paths
            ),
        ]
        routes = [
            *({**route, "match": _with_key(route["match"], GOOD_KEY)} for route in routes),
            {"match": _with_key({"prefix": "/"}, ANY_KEY), "direct_response": refused},
            *keyless,
            *({**route, **added} for route in routes),
        ]
    resource["virtual_hosts"] = [{"name": item["name"], "domains": ["*"], "routes": [*private, *routes]}]
    return resource

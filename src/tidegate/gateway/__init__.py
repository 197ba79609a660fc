"""HTTP for programs: OpenAI's moderations and chat completions, with a guard in the token stream.

Streamed text travels: upstream (bytes) -> sse (events) -> answers (judged, released) -> chat (the exchange) -> client.
"""

//! Bytes of a guest, as the bridge hears them: in two pieces, as what answers a call, and what has become of a golden message.
#![no_main]

use qmp_bridge::guest::hear_anything;
use serde_json::Value;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let (head, tail) = input.split_at(input.len() / 2);
    hear_anything(&[head, tail]);
    let answer = |kind: &str| [b"{\"id\":1,\"", kind.as_bytes(), b"\":", input, b"}\n"].concat();
    hear_anything(&[&answer("return"), &answer("error")]);
    // Golden messages are of several lines, and have the answer inside.
    if let Ok(message) = serde_json::from_slice::<Value>(input)
        && let Some(response) = message.get("response")
    {
        hear_anything(&[format!("{response}\n").as_bytes()]);
    }
});

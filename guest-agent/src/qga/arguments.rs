//! Takes the arguments of a command apart; what is wrong with them is said in QEMU's words.
//!
//! Every command reads its arguments in the schema's order and then calls [`Arguments::end`], so that a misspelt optional
//! argument is refused and not ignored. Called by the families of commands.
#![deny(clippy::indexing_slicing)]

use super::failed::Failed;
use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Map, Value};

/// Clients encode with and without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// Bytes as base64 text.
pub(super) fn encode(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

/// What has not been read yet of an object.
#[derive(Clone, Debug, Default)]
pub(super) struct Arguments {
    /// `vcpus[0].`, for messages.
    prefix: String,
    left: Map<String, Value>,
}

impl Arguments {
    pub(super) fn new(left: Map<String, Value>) -> Self {
        Self {
            prefix: String::new(),
            left,
        }
    }

    /// Nothing may be left.
    pub(super) fn end(&self) -> Result<(), Failed> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(name) => Err(Failed::generic(format!(
                "Parameter '{}{name}' is unexpected",
                self.prefix
            ))),
        }
    }

    fn missing(&self, name: &str) -> Failed {
        Failed::generic(format!("Parameter '{}{name}' is missing", self.prefix))
    }

    fn wrong(&self, name: &str, expected: &str) -> Failed {
        let prefix = &self.prefix;
        Failed::generic(format!(
            "Invalid parameter type for '{prefix}{name}', expected: {expected}"
        ))
    }

    fn maybe<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(Value) -> Option<T>,
    ) -> Result<Option<T>, Failed> {
        match self.left.remove(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.wrong(name, expected)),
            },
        }
    }

    /// A text that may be left out.
    pub(super) fn maybe_text(&mut self, name: &str) -> Result<Option<String>, Failed> {
        self.maybe(name, "string", |value| match value {
            Value::String(text) => Some(text),
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::Array(_)
            | Value::Object(_) => None,
        })
    }

    pub(super) fn text(&mut self, name: &str) -> Result<String, Failed> {
        self.maybe_text(name)?.ok_or_else(|| self.missing(name))
    }

    /// An integer that may be left out.
    pub(super) fn maybe_integer(&mut self, name: &str) -> Result<Option<i64>, Failed> {
        self.maybe(name, "integer", |value| value.as_i64())
    }

    pub(super) fn integer(&mut self, name: &str) -> Result<i64, Failed> {
        self.maybe_integer(name)?.ok_or_else(|| self.missing(name))
    }

    /// A truth value; false if it is left out.
    pub(super) fn maybe_flag(&mut self, name: &str) -> Result<bool, Failed> {
        let value = self.maybe(name, "boolean", |value| value.as_bool())?;
        Ok(value.unwrap_or(false))
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<bool, Failed> {
        let value = self.maybe(name, "boolean", |value| value.as_bool())?;
        value.ok_or_else(|| self.missing(name))
    }

    /// Bytes in base64 that may be left out.
    pub(super) fn maybe_bytes(&mut self, name: &str) -> Result<Option<Vec<u8>>, Failed> {
        let Some(text) = self.maybe_text(name)? else {
            return Ok(None);
        };
        let text: Vec<u8> = text.into_bytes();
        let text: Vec<u8> = text.into_iter().filter(|byte| *byte != b'\n').collect();
        BASE64
            .decode(text)
            .map(Some)
            .map_err(|_| Failed::generic("Base64 data contains invalid characters"))
    }

    pub(super) fn bytes(&mut self, name: &str) -> Result<Vec<u8>, Failed> {
        self.maybe_bytes(name)?.ok_or_else(|| self.missing(name))
    }

    /// Any value, for those that may have several types.
    pub(super) fn value(&mut self, name: &str) -> Result<Value, Failed> {
        self.left.remove(name).ok_or_else(|| self.missing(name))
    }

    fn maybe_list(&mut self, name: &str) -> Result<Option<Vec<Value>>, Failed> {
        self.maybe(name, "array", |value| match value {
            Value::Array(list) => Some(list),
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Object(_) => None,
        })
    }

    /// A list of texts that may be left out.
    pub(super) fn maybe_texts(&mut self, name: &str) -> Result<Option<Vec<String>>, Failed> {
        let Some(list) = self.maybe_list(name)? else {
            return Ok(None);
        };
        let texts = list.into_iter().enumerate().map(|(at, value)| {
            value
                .as_str()
                .map(str::to_owned)
                .ok_or_else(|| self.wrong(&format!("{name}[{at}]"), "string"))
        });
        texts.collect::<Result<_, _>>().map(Some)
    }

    pub(super) fn texts(&mut self, name: &str) -> Result<Vec<String>, Failed> {
        self.maybe_texts(name)?.ok_or_else(|| self.missing(name))
    }

    /// A list of objects.
    pub(super) fn objects(&mut self, name: &str) -> Result<Vec<Self>, Failed> {
        let list = self.maybe_list(name)?.ok_or_else(|| self.missing(name))?;
        let objects = list.into_iter().enumerate().map(|(at, value)| match value {
            Value::Object(left) => Ok(Self {
                prefix: format!("{}{name}[{at}].", self.prefix),
                left,
            }),
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_) => Err(self.wrong(&format!("{name}[{at}]"), "object")),
        });
        objects.collect()
    }
}

#[cfg(test)]
mod tests {
    //! The words of QEMU's agent, as it was heard to say them.
    use super::*;
    use serde_json::json;

    fn arguments(value: &Value) -> Arguments {
        Arguments::new(value.as_object().unwrap().clone())
    }

    #[test]
    fn wrong_arguments_are_named_as_qemu_names_them() {
        let mut given = arguments(&json!({
            "id": 1.5, "mode": 5, "arg": "x", "keys": [5], "vcpus": [{"logical-id": 0}], "buf": "%%"
        }));
        let desc = |failed: Failed| failed.desc;
        assert_eq!(
            desc(given.text("path").unwrap_err()),
            "Parameter 'path' is missing"
        );
        assert_eq!(
            desc(given.integer("id").unwrap_err()),
            "Invalid parameter type for 'id', expected: integer"
        );
        assert_eq!(
            desc(given.maybe_text("mode").unwrap_err()),
            "Invalid parameter type for 'mode', expected: string"
        );
        assert_eq!(
            desc(given.texts("arg").unwrap_err()),
            "Invalid parameter type for 'arg', expected: array"
        );
        assert_eq!(
            desc(given.texts("keys").unwrap_err()),
            "Invalid parameter type for 'keys[0]', expected: string"
        );
        let mut vcpu = given.objects("vcpus").unwrap().remove(0);
        assert_eq!(vcpu.integer("logical-id").unwrap(), 0);
        assert_eq!(
            desc(vcpu.flag("online").unwrap_err()),
            "Parameter 'vcpus[0].online' is missing"
        );
        assert_eq!(
            desc(given.bytes("buf").unwrap_err()),
            "Base64 data contains invalid characters"
        );
        assert!(given.end().is_ok());
        assert_eq!(
            desc(arguments(&json!({"z": 1})).end().unwrap_err()),
            "Parameter 'z' is unexpected"
        );
    }

    #[test]
    fn base64_is_read_with_and_without_padding_and_over_several_lines() {
        for text in ["YWJjZA==", "YWJjZA", "YWJj\nZA==\n"] {
            assert_eq!(arguments(&json!({"b": text})).bytes("b").unwrap(), b"abcd");
        }
    }
}

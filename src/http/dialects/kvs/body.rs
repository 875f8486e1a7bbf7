//! Reads the body of a request, as far as these dialects look at it. Parts of it are kept as
//! the text they came as: a value is returned as it was given, with its numbers, the order of its
//! fields and its spaces.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::http::dialects::value::JsonText;

/// A body.
#[derive(Debug, Clone, Copy)]
pub enum KvsBody<'a> {
    Object(Fields<'a>),
    /// JSON that is no object.
    Other,
    /// No body, or no JSON.
    Nothing,
}

/// The fields that any of the routes looks at. Of a field given twice the last counts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fields<'a> {
    pub value: Option<&'a RawValue>,
    pub view: Option<&'a RawValue>,
    pub repl_factor: Option<&'a RawValue>,
    pub causal_context: Option<&'a RawValue>,
}

impl<'a> KvsBody<'a> {
    pub fn read(body: &'a [u8]) -> Self {
        let text = std::str::from_utf8(body).ok();
        match text.and_then(|text| serde_json::from_str::<&RawValue>(text).ok()) {
            None => KvsBody::Nothing,
            Some(json) if json.get().starts_with('{') => {
                serde_json::from_str(json.get()).map_or(KvsBody::Nothing, KvsBody::Object)
            }
            Some(_) => KvsBody::Other,
        }
    }

    /// Returns the causal context that the answer repeats. None if the request carries none.
    pub fn causal_context(&self) -> Option<Box<RawValue>> {
        let KvsBody::Object(Fields {
            causal_context: Some(given),
            ..
        }) = self
        else {
            return None;
        };
        let given = if given.get().starts_with('{') {
            given.get()
        } else {
            "{}"
        };
        RawValue::from_string(given.to_owned()).ok()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Fields::default();
        while let Some(JsonText(name)) = map.next_key()? {
            let field = match &*name {
                "value" => &mut fields.value,
                "view" => &mut fields.view,
                "repl-factor" => &mut fields.repl_factor,
                "causal-context" => &mut fields.causal_context,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            *field = Some(map.next_value()?);
        }
        Ok(fields)
    }
}

//! Holds the body of a request to objects where the API has objects. serde takes the members of an array for the fields
//! of a struct, in the order of the source: what such a body means would change with the next field. Must never let one
//! pass, however deep it is.

use serde::{
    Deserializer,
    de::{
        DeserializeOwned, Error as _, IntoDeserializer, Unexpected, Visitor,
        value::{MapAccessDeserializer, MapDeserializer, SeqDeserializer},
    },
    forward_to_deserialize_any,
};
use serde_json::{Error, Value};

/// Refuses a body, which is a `T`, if it has an array in the place of an object. What the derived code of a type keeps
/// aside before it decides (`flatten`, an enum by its tag) is not looked into, nor are the fields of a variant: no body
/// has such parts.
///
/// # Errors
/// What was expected instead of the array.
pub(super) fn check<T: DeserializeOwned>(body: &[u8]) -> Result<(), Error> {
    if !body.contains(&b'[') {
        return Ok(());
    }
    let value: Value = serde_json::from_slice(body)?;
    if value.is_array() {
        // No operation takes one.
        return Err(Error::invalid_type(Unexpected::Seq, &"an object"));
    }
    T::deserialize(Strict(value)).map(|_| ())
}

/// JSON of which an array is never a struct.
struct Strict(Value);

impl IntoDeserializer<'_, Error> for Strict {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Strict {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(members) => visitor.visit_seq(SeqDeserializer::new(members.into_iter().map(Strict))),
            Value::Object(fields) => {
                visitor.visit_map(MapDeserializer::new(fields.into_iter().map(|(name, value)| (name, Strict(value)))))
            }
            plain => plain.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(_) => Err(Error::invalid_type(Unexpected::Seq, &"an object")),
            other => Self(other).deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            other => visitor.visit_some(Self(other)),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0 {
            Value::Object(fields) => {
                let fields = fields.into_iter().map(|(name, value)| (name, Strict(value)));
                visitor.visit_enum(MapAccessDeserializer::new(MapDeserializer::new(fields)))
            }
            plain => plain.deserialize_enum(name, variants, visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};
    use serde_json::json;

    use super::*;

    #[derive(Deserialize, Serialize)]
    #[serde(rename_all = "camelCase")]
    enum Kind {
        Plain,
        With(Inner),
        Named { inner: Inner },
    }

    #[derive(Deserialize, Serialize)]
    struct Inner {
        number: u64,
        text: Option<String>,
    }

    #[derive(Deserialize, Serialize)]
    struct Outer {
        kinds: Vec<Kind>,
        wrapped: Wrapped,
        pair: (u8, f64),
        more: Option<Box<Outer>>,
        any: Value,
    }

    #[derive(Deserialize, Serialize)]
    struct Wrapped(Inner);

    fn outer(more: Option<Outer>) -> Outer {
        let inner = |number| Inner { number, text: Some("[".to_owned()) };
        let kinds = vec![Kind::Plain, Kind::With(inner(u64::MAX)), Kind::Named { inner: inner(0) }];
        Outer { kinds, wrapped: Wrapped(inner(1)), pair: (2, 0.5), more: more.map(Box::new), any: json!([[1]]) }
    }

    #[test]
    fn what_serde_writes_passes() {
        let body = serde_json::to_vec(&outer(Some(outer(None)))).unwrap();
        check::<Outer>(&body).unwrap();
    }

    #[test]
    fn an_array_is_found_wherever_it_is() {
        let sound = serde_json::to_value(outer(Some(outer(None)))).unwrap();
        for place in ["/kinds/1/with", "/kinds/2/named/inner", "/wrapped", "/more", "/more/wrapped"] {
            let mut body = sound.clone();
            let object = body.pointer_mut(place).unwrap();
            // As serde would take it: all fields, in their order.
            let fields: Vec<&str> =
                if place == "/more" { vec!["kinds", "wrapped", "pair", "more", "any"] } else { vec!["number", "text"] };
            *object = fields.iter().map(|name| object[*name].clone()).collect();
            let bytes = serde_json::to_vec(&body).unwrap();
            assert!(serde_json::from_slice::<Outer>(&bytes).is_ok(), "{place}: serde alone takes it");
            assert!(check::<Outer>(&bytes).unwrap_err().to_string().contains("expected an object"), "{place}");
        }
    }
}

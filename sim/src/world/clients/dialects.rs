//! Requests in the dialects of other stores: `kvs`, the encoded and the plain batch. They tell less
//! than ours: no revisions, and of what failed not whether it was done.

use std::collections::BTreeMap;

use http::Method;
use quorate_sim::history::{Action, Condition, Outcome, Value};
use serde_json::{Value as Json, json};

use super::book::Answer;
use super::http::{Ask, Reply, Silence};
use super::worker::{Client, in_path};
use super::writes::value_of;

const UNKNOWN: Answer = Answer::Told(Outcome::Unknown);

impl Client {
    /// Puts, gets or deletes a key.
    pub async fn use_kvs(&mut self, key: usize) {
        let condition = Condition::None;
        let value = self.book.lock().new_value();
        let action = match self.random.below(10) {
            0..4 => Action::Get,
            4..8 => Action::Put { value, condition },
            _ => Action::Delete { condition },
        };
        let path = format!("/kvs/keys/{}", in_path(&self.key(key)));
        let ask = match action {
            Action::Get => Ask::new(Method::GET, path),
            Action::Put { value, .. } => {
                Ask::new(Method::PUT, path).json(&json!({ "value": value.0.to_string() }))
            }
            Action::Delete { .. } => Ask::new(Method::DELETE, path),
        };
        let called = self.began.elapsed();
        let answer = match (self.ask_any(&ask).await, action) {
            (Err(Silence::NotDone), _) => Answer::Refused,
            (Err(Silence::Unknown), _) => UNKNOWN,
            (Ok(reply), Action::Get) => match (reply.status.as_u16(), reply.json()) {
                (200, Some(body)) => {
                    let value = body.get("value").and_then(Json::as_str).unwrap_or_default();
                    Answer::Told(Outcome::Read(Some(value_of(value.as_bytes()))))
                }
                (404, _) => Answer::Told(Outcome::Read(None)),
                _ => Answer::Refused,
            },
            (Ok(reply), Action::Put { .. }) => match reply.status.as_u16() {
                status @ (200 | 201) => {
                    let created = Some(status == 201);
                    Answer::Told(Outcome::Stored { created })
                }
                _ => UNKNOWN,
            },
            (Ok(reply), Action::Delete { .. }) => match reply.status.as_u16() {
                status @ (200 | 404) => {
                    let existed = status == 200;
                    Answer::Told(Outcome::Deleted { existed })
                }
                _ => UNKNOWN,
            },
        };
        let times = self.times(called);
        self.book.lock().record(key, times, action, answer);
    }

    /// Puts keys, fetches them, or asks whether they are there.
    pub async fn use_encoded_batch(&mut self, keys: &[usize]) {
        let in_json = |text: &str| json!({ "encoding": "string", "data": text });
        let names: Vec<Json> = keys.iter().map(|key| in_json(&self.name(*key))).collect();
        match self.random.below(3) {
            0 => {
                let values = self.new_values(keys.len());
                let pairs: Vec<Json> = names
                    .iter()
                    .zip(&values)
                    .map(|(name, value)| {
                        json!({ "key": name, "value": in_json(&value.0.to_string()) })
                    })
                    .collect();
                let ask = Ask::new(Method::PUT, "/set").json(&pairs.into());
                // If some failed, it is not looked at which.
                self.put_all(keys, &values, &ask, |reply| reply.status.as_u16() == 200)
                    .await;
            }
            kind => {
                let path = if kind == 1 { "/fetch" } else { "/query" };
                let ask = Ask::new(Method::POST, path).json(&names.into());
                self.read_all(keys, &ask, |reply| {
                    let items = reply.json()?;
                    let items = items.as_array()?.iter().map(|item| {
                        let name = item.get("key")?.get("data")?.as_str()?.to_owned();
                        let value = item.get("value")?;
                        let outcome = match value.as_bool() {
                            Some(found) => Outcome::Found(found),
                            None if value.get("encoding")?.as_str()?.is_empty() => {
                                Outcome::Read(None)
                            }
                            None => {
                                let data = value.get("data")?.as_str()?;
                                Outcome::Read(Some(value_of(data.as_bytes())))
                            }
                        };
                        Some((name, outcome))
                    });
                    items.collect()
                })
                .await;
            }
        }
    }

    /// Puts keys, or gets them.
    pub async fn use_plain_batch(&mut self, keys: &[usize]) {
        let names: Vec<String> = keys.iter().map(|key| self.name(*key)).collect();
        if self.random.percent(50) {
            let values = self.new_values(keys.len());
            let pairs: Vec<Json> = names
                .iter()
                .zip(&values)
                .map(|(name, value)| json!({ "key": name, "value": value.0.to_string() }))
                .collect();
            let ask = Ask::new(Method::POST, "/set").json(&pairs.into());
            self.put_all(keys, &values, &ask, |reply| reply.status.as_u16() == 200)
                .await;
            return;
        }
        let names: Vec<Json> = names.iter().map(|name| json!({ "key": name })).collect();
        let ask = Ask::new(Method::POST, "/get").json(&names.into());
        self.read_all(keys, &ask, |reply| {
            let body = reply.json()?;
            let list = |name: &str| {
                let list = body.get(name).and_then(Json::as_array);
                list.cloned().unwrap_or_default()
            };
            let found = list("existedKey").into_iter().map(|item| (item, true));
            let missing = list("notExistedKey").into_iter().map(|item| (item, false));
            let items = found.chain(missing).map(|(item, is_there)| {
                let name = item.get("key")?.as_str()?.to_owned();
                let value = value_of(item.get("value")?.as_str()?.as_bytes());
                Some((name, Outcome::Read(is_there.then_some(value))))
            });
            items.collect()
        })
        .await;
    }

    /// Asks any of the servers: all of them fetch the answer.
    async fn ask_any(&mut self, ask: &Ask) -> Result<Reply, Silence> {
        let server = self.random.pick(&self.servers).clone();
        self.http.ask(&server, ask).await
    }

    async fn put_all(
        &mut self,
        keys: &[usize],
        values: &[Value],
        ask: &Ask,
        is_stored: impl Fn(&Reply) -> bool,
    ) {
        let called = self.began.elapsed();
        let answer = match self.ask_any(ask).await {
            Ok(reply) if is_stored(&reply) => Answer::Told(Outcome::Stored { created: None }),
            Err(Silence::NotDone) => Answer::Refused,
            Ok(_) | Err(Silence::Unknown) => UNKNOWN,
        };
        let times = self.times(called);
        let mut book = self.book.lock();
        for (key, value) in keys.iter().zip(values) {
            let action = Action::Put {
                value: *value,
                condition: Condition::None,
            };
            book.record(*key, times, action, answer);
        }
    }

    async fn read_all(
        &mut self,
        keys: &[usize],
        ask: &Ask,
        understand: impl Fn(&Reply) -> Option<BTreeMap<String, Outcome>>,
    ) {
        let called = self.began.elapsed();
        let reply = self.ask_any(ask).await;
        let times = self.times(called);
        let answers = reply
            .ok()
            .filter(|reply| reply.status.as_u16() == 200)
            .map(|reply| understand(&reply));
        let names: Vec<String> = keys.iter().map(|key| self.name(*key)).collect();
        let mut book = self.book.lock();
        let answers = match answers {
            None => return book.refuse(),
            Some(Some(answers)) if names.iter().all(|name| answers.contains_key(name)) => answers,
            Some(_) => return book.complain(format!("{ask:?} was answered, but not all of it")),
        };
        for (key, name) in keys.iter().zip(&names) {
            let answer = Answer::Told(answers[name]);
            book.record(*key, times, Action::Get, answer);
        }
    }

    fn name(&self, key: usize) -> String {
        String::from_utf8_lossy(&self.key(key)).into_owned()
    }

    fn new_values(&self, count: usize) -> Vec<Value> {
        let mut book = self.book.lock();
        (0..count).map(|_| book.new_value()).collect()
    }
}

//! `quorate kv`: keys and values from the shell.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::servers::Servers;
use super::{CliError, EXIT_CODES, Exit};
use crate::client::native::{ListQuery, NativeClient, WriteHeaders};

/// Items of a page of a listing. The servers' own maximum.
const PAGE_ITEMS: usize = 1000;

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct KvArguments {
    #[command(flatten)]
    servers: Servers,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: KvSubcommand,
}

#[derive(Debug, Subcommand)]
enum KvSubcommand {
    /// Write a key's value to standard output, byte for byte
    #[command(after_help = EXIT_CODES)]
    Get {
        /// The key, as it is: nothing in it is escaped
        key: String,
        /// Read what the replica at hand has, however old
        #[arg(long)]
        stale: bool,
    },
    /// Store a value under a key
    #[command(after_help = EXIT_CODES)]
    Put {
        /// The key, as it is: nothing in it is escaped
        key: String,
        /// The value; `-` or nothing: standard input
        #[arg(conflicts_with = "file")]
        value: Option<String>,
        /// Take the value from a file
        #[arg(short, long, value_name = "PATH")]
        file: Option<PathBuf>,
        /// The media type that the value is stored with
        #[arg(short = 't', long, value_name = "TYPE")]
        content_type: Option<String>,
        #[command(flatten)]
        conditions: WriteConditions,
    },
    /// Delete a key
    #[command(after_help = EXIT_CODES)]
    Del {
        /// The key, as it is: nothing in it is escaped
        key: String,
        #[command(flatten)]
        conditions: WriteConditions,
    },
    /// List keys and values in key order
    #[command(after_help = EXIT_CODES)]
    Ls {
        /// Only keys that begin so
        #[arg(short, long, default_value = "")]
        prefix: String,
        /// At most this many [default: all]
        #[arg(short, long)]
        limit: Option<usize>,
        /// Leave the values out
        #[arg(short, long)]
        keys_only: bool,
        /// From the last key to the first
        #[arg(short, long)]
        reverse: bool,
        /// Read what the replicas at hand have, however old
        #[arg(long)]
        stale: bool,
    },
}

/// Conditions that must hold for a write to happen.
#[derive(Debug, Args)]
struct WriteConditions {
    /// Only if the key is at this revision (`*`: if it exists)
    #[arg(long, value_name = "REVISION")]
    if_match: Option<String>,
    /// Only if the key is not at this revision (`*`: if it does not exist)
    #[arg(long, value_name = "REVISION")]
    if_none_match: Option<String>,
    /// Makes it safe to repeat: the same request with the same key is done once, and is sent again
    /// until the timeout
    #[arg(long, value_name = "TEXT")]
    idempotency_key: Option<String>,
}

impl WriteConditions {
    fn headers(self, content_type: Option<String>) -> WriteHeaders {
        WriteHeaders {
            content_type,
            if_match: self.if_match.map(entity_tag),
            if_none_match: self.if_none_match.map(entity_tag),
            idempotency_key: self.idempotency_key,
        }
    }
}

/// Revisions may be given as bare numbers; on the wire they stand in quotes.
fn entity_tag(text: String) -> String {
    let bare = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if bare { format!("\"{text}\"") } else { text }
}

/// Runs one command about keys.
///
/// # Errors
///
/// Fails if a condition does not hold, nobody answers, or standard output is closed.
pub async fn run(arguments: KvArguments) -> Result<Exit, CliError> {
    let mut client = arguments.servers.client();
    match arguments.command {
        KvSubcommand::Get { key, stale } => get(&mut client, &key, stale, arguments.json).await,
        KvSubcommand::Put {
            key,
            value,
            file,
            content_type,
            conditions,
        } => {
            let value = read_value(value, file.as_deref())?;
            let written = client
                .put(key.as_bytes(), value, &conditions.headers(content_type))
                .await?;
            let created = written.created.unwrap_or(false);
            let text = format!(
                "revision {}{}",
                written.revision,
                if created { " (new)" } else { "" }
            );
            say(
                arguments.json,
                || json!({ "key": key, "revision": written.revision, "created": created }),
                &text,
            )
        }
        KvSubcommand::Del { key, conditions } => match client
            .delete(key.as_bytes(), &conditions.headers(None))
            .await?
        {
            None => missing(&key),
            Some(written) => {
                let text = format!("deleted at revision {}", written.revision);
                say(
                    arguments.json,
                    || json!({ "key": key, "revision": written.revision }),
                    &text,
                )
            }
        },
        KvSubcommand::Ls {
            prefix,
            limit,
            keys_only,
            reverse,
            stale,
        } => {
            let query = ListQuery {
                prefix: prefix.into(),
                reverse,
                keys_only,
                stale,
                ..ListQuery::default()
            };
            list(&mut client, query, limit, arguments.json).await
        }
    }
}

async fn get(
    client: &mut NativeClient,
    key: &str,
    stale: bool,
    as_json: bool,
) -> Result<Exit, CliError> {
    let Some(value) = client.get(key.as_bytes(), stale).await? else {
        return missing(key);
    };
    if as_json {
        // JSON has no bytes, so what is no text is written in base64.
        let (text, encoding) = match std::str::from_utf8(&value.bytes) {
            Ok(text) => (text.to_owned(), "utf8"),
            Err(_) => (STANDARD.encode(&value.bytes), "base64"),
        };
        let mut object = json!({
            "key": key,
            "value": text,
            "encoding": encoding,
            "media_type": value.content_type,
            "revision": value.revision,
        });
        if let Some(staleness) = value.staleness {
            // It may be the word `unknown` as well.
            object["staleness_ms"] = staleness
                .parse::<u64>()
                .map_or(Value::String(staleness), Value::from);
        }
        return print(format!("{object}\n").as_bytes());
    }
    print(&value.bytes)
}

async fn list(
    client: &mut NativeClient,
    mut query: ListQuery,
    limit: Option<usize>,
    as_json: bool,
) -> Result<Exit, CliError> {
    // Page by page, each printed at once: a listing may be larger than memory.
    let mut left = limit.unwrap_or(usize::MAX);
    while left > 0 {
        query.limit = left.min(PAGE_ITEMS);
        let page = client.list(&query).await?;
        left = left.saturating_sub(page.items.len());
        let mut text = Vec::new();
        for item in &page.items {
            if as_json {
                text.extend_from_slice(item.to_string().as_bytes());
            } else {
                text.extend(shown(&item["key"], &item["key_encoding"]));
                if !query.keys_only {
                    text.push(b'\t');
                    text.extend(shown(&item["value"], &item["encoding"]));
                }
            }
            text.push(b'\n');
        }
        print(&text)?;
        match page.next_cursor {
            Some(cursor) => query.cursor = Some(cursor),
            None => break,
        }
    }
    Ok(Exit::Done)
}

/// Returns a key or value on one line: control characters and what is not UTF-8 are escaped.
fn shown(text: &Value, encoding: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap_or_default();
    if encoding == "base64" {
        let bytes = STANDARD
            .decode(text)
            .unwrap_or_else(|_| text.as_bytes().to_vec());
        return bytes.escape_ascii().collect();
    }
    let escape = |c: char| {
        if c.is_control() {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    };
    text.chars().map(escape).collect::<String>().into_bytes()
}

fn read_value(value: Option<String>, file: Option<&Path>) -> Result<Bytes, CliError> {
    if let Some(path) = file {
        let failed = |source| CliError::Io {
            what: path.display().to_string(),
            source,
        };
        return std::fs::read(path).map(Bytes::from).map_err(failed);
    }
    match value.filter(|value| value != "-") {
        Some(value) => Ok(value.into()),
        None => {
            let mut bytes = Vec::new();
            let failed = |source| CliError::Io {
                what: "standard input".into(),
                source,
            };
            io::stdin().read_to_end(&mut bytes).map_err(failed)?;
            Ok(bytes.into())
        }
    }
}

fn missing(key: &str) -> Result<Exit, CliError> {
    super::print_error(&format!("there is no key '{}'", key.escape_debug()));
    Ok(Exit::Missing)
}

fn say(as_json: bool, object: impl FnOnce() -> Value, text: &str) -> Result<Exit, CliError> {
    let line = if as_json {
        object().to_string()
    } else {
        text.to_owned()
    };
    print(format!("{line}\n").as_bytes())
}

fn print(bytes: &[u8]) -> Result<Exit, CliError> {
    let mut output = io::stdout().lock();
    output
        .write_all(bytes)
        .and_then(|()| output.flush())
        .map_err(CliError::output)?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_listed_stays_on_its_line() {
        assert_eq!(
            shown(&json!("a\tb\nc ü"), &Value::Null),
            "a\\tb\\nc ü".as_bytes()
        );
        assert_eq!(shown(&json!("/wA="), &json!("base64")), b"\\xff\\x00");
    }

    #[test]
    fn revisions_are_quoted_and_other_tags_left_alone() {
        assert_eq!(entity_tag("12".into()), "\"12\"");
        assert_eq!(entity_tag("*".into()), "*");
        assert_eq!(entity_tag("\"1\", \"2\"".into()), "\"1\", \"2\"");
    }
}

//! `If-Match` and `If-None-Match` (RFC 9110, sections 13.1.1 and 13.1.2): parsed, evaluated for
//! reads, and turned into a condition for writes.
//!
//! An entity tag of ours is a revision's digits between quotes. Another tag is legal and matches
//! nothing.

use http::{HeaderMap, HeaderName, header};

use crate::http::problem::{Code, Problem};
use crate::sm::kv::Condition;
use crate::types::{PlanEpoch, Revision};

/// Tags of one header. Each is kept in a log entry, so there is a bound.
const TAGS_MAX: usize = 1000;

/// The tags that one of the two headers names.
#[derive(Debug, Clone, PartialEq, Eq)]
enum EntityTags {
    /// `*`
    Any,
    These(Vec<Revision>),
}

/// The conditions of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    matches: Option<EntityTags>,
    none_matches: Option<EntityTags>,
}

/// The outcome of the conditions of a read of a key that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadDecision {
    Answer,
    NotModified,
    Failed,
}

impl Conditions {
    pub fn of_request(headers: &HeaderMap) -> Result<Self, Problem> {
        // `If-Match` compares strongly: a weak tag matches nothing. `If-None-Match` compares
        // weakly.
        let matches = tags(headers, header::IF_MATCH, WeakTags::MatchNothing)?;
        let none_matches = tags(headers, header::IF_NONE_MATCH, WeakTags::AreTheSame)?;
        Ok(Self {
            matches,
            none_matches,
        })
    }

    /// Evaluates the conditions of a read of a key at `revision`. For a missing key they are not
    /// evaluated: the answer would be 404 anyway (RFC 9110, section 13.2.1).
    pub fn read_decision(&self, revision: Revision) -> ReadDecision {
        let named = |tags: &EntityTags| match tags {
            EntityTags::Any => true,
            EntityTags::These(revisions) => revisions.contains(&revision),
        };
        if self.matches.as_ref().is_some_and(|tags| !named(tags)) {
            ReadDecision::Failed
        } else if self.none_matches.as_ref().is_some_and(named) {
            ReadDecision::NotModified
        } else {
            ReadDecision::Answer
        }
    }

    /// Returns the plan that the view must still follow for a change of it. None if any will do.
    pub fn epoch(&self) -> Result<Option<PlanEpoch>, Problem> {
        match (&self.matches, &self.none_matches) {
            (None | Some(EntityTags::Any), None) => Ok(None),
            (Some(EntityTags::These(tags)), None) if tags.len() == 1 => {
                Ok(Some(PlanEpoch(tags[0].0)))
            }
            _ => Err(Problem::new(
                Code::InvalidHeader,
                "the condition of a change of the view is If-Match with one epoch in quotes, as in \
                the ETag of /v1/cluster",
            )),
        }
    }

    /// Returns the conditions as that of a write.
    pub fn condition(self) -> Result<Condition, Problem> {
        Ok(match (self.matches, self.none_matches) {
            (None, None) => Condition::None,
            (Some(EntityTags::Any), None) => Condition::Present,
            (Some(EntityTags::These(revisions)), None) => Condition::RevisionIn(revisions),
            (None, Some(EntityTags::Any)) => Condition::Absent,
            (None, Some(EntityTags::These(revisions))) => Condition::RevisionNotIn(revisions),
            // Present and absent at once: at none of no revisions, which never holds.
            (Some(_), Some(EntityTags::Any)) => Condition::RevisionIn(Vec::new()),
            (Some(EntityTags::These(mut revisions)), Some(EntityTags::These(not))) => {
                revisions.retain(|revision| !not.contains(revision));
                Condition::RevisionIn(revisions)
            }
            (Some(EntityTags::Any), Some(EntityTags::These(_))) => {
                let detail = "If-Match: * and a list in If-None-Match can't be combined in a write";
                return Err(Problem::new(Code::InvalidHeader, detail));
            }
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WeakTags {
    MatchNothing,
    AreTheSame,
}

/// Returns the tags of every line of the header `name`, which together are one list.
fn tags(
    headers: &HeaderMap,
    name: HeaderName,
    weak: WeakTags,
) -> Result<Option<EntityTags>, Problem> {
    let mut lines = headers.get_all(&name).iter().peekable();
    if lines.peek().is_none() {
        return Ok(None);
    }
    let bad = |reason: &str| Problem::new(Code::InvalidHeader, format!("{name} {reason}"));

    // Foreign tags count too: a list of them alone is a condition that matches nothing, not none at
    // all.
    let (mut any, mut count, mut revisions) = (false, 0, Vec::new());
    for line in lines {
        let mut rest = line.as_bytes().trim_ascii();
        while !rest.is_empty() {
            // Empty elements of a list are ignored (RFC 9110, section 5.6.1).
            if let Some(after) = rest.strip_prefix(b",") {
                rest = after.trim_ascii_start();
                continue;
            }
            let tag;
            (tag, rest) =
                tag_at(rest).ok_or_else(|| bad("is neither * nor a list of quoted entity tags"))?;
            match tag {
                EntityTag::Any => any = true,
                EntityTag::Entity { opaque, is_weak }
                    if !is_weak || weak == WeakTags::AreTheSame =>
                {
                    revisions.extend(revision(opaque))
                }
                EntityTag::Entity { .. } => {}
            }
            count += 1;
            rest = rest.trim_ascii_start();
            if !rest.is_empty() && !rest.starts_with(b",") {
                return Err(bad("has no comma between its entity tags"));
            }
        }
    }
    match (any, count) {
        (_, 0) => Err(bad("is empty")),
        (true, 1) => Ok(Some(EntityTags::Any)),
        (true, _) => Err(bad("has * beside entity tags")),
        (false, 1..=TAGS_MAX) => Ok(Some(EntityTags::These(revisions))),
        (false, _) => Err(bad("has more than 1000 entity tags")),
    }
}

enum EntityTag<'a> {
    Any,
    Entity { opaque: &'a [u8], is_weak: bool },
}

/// Returns the tag that `text` begins with, and what is after it.
fn tag_at(text: &[u8]) -> Option<(EntityTag<'_>, &[u8])> {
    if let Some(after) = text.strip_prefix(b"*") {
        return Some((EntityTag::Any, after));
    }
    let strong = text.strip_prefix(b"W/");
    let (is_weak, quoted) = (
        strong.is_some(),
        strong.unwrap_or(text).strip_prefix(b"\"")?,
    );
    let end = quoted.iter().position(|byte| *byte == b'"')?;
    let (opaque, after) = (&quoted[..end], &quoted[end + 1..]);
    // etagc = %x21 / %x23-7E / obs-text
    let legal = opaque.iter().all(|byte| *byte > b' ' && *byte != 0x7f);
    legal.then_some((EntityTag::Entity { opaque, is_weak }, after))
}

/// Returns the revision that a tag stands for, if it could be one of ours.
fn revision(opaque: &[u8]) -> Option<Revision> {
    let text = std::str::from_utf8(opaque).ok()?;

    // Tags compare as text, so `"007"` is not the tag of revision 7.
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(Revision(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn parse(lines: &[(&'static str, &'static str)]) -> Result<Conditions, String> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_static(value));
        }
        Conditions::of_request(&headers).map_err(|problem| problem.detail)
    }

    fn write(lines: &[(&'static str, &'static str)]) -> Condition {
        parse(lines)
            .expect("good headers")
            .condition()
            .expect("expressible")
    }

    fn revisions(numbers: &[u64]) -> Vec<Revision> {
        numbers.iter().map(|number| Revision(*number)).collect()
    }

    #[test]
    fn writes_get_the_condition_that_the_headers_mean() {
        assert_eq!(write(&[]), Condition::None);
        assert_eq!(write(&[("if-match", "*")]), Condition::Present);
        assert_eq!(write(&[("if-none-match", " * ")]), Condition::Absent);
        assert_eq!(
            write(&[("if-match", "\"3\", \"5\"")]),
            Condition::RevisionIn(revisions(&[3, 5]))
        );
        assert_eq!(
            write(&[("if-match", "\"3\""), ("if-match", ",,\"5\",")]),
            Condition::RevisionIn(revisions(&[3, 5]))
        );
        assert_eq!(
            write(&[("if-none-match", "W/\"3\"")]),
            Condition::RevisionNotIn(revisions(&[3]))
        );
        // Weak tags never match strongly, and foreign ones match nothing; a condition that can't
        // hold is still a condition.
        for never in [
            "W/\"3\"",
            "\"abc\"",
            "\"03\"",
            "\"+3\"",
            "\"\"",
            "\"99999999999999999999999\"",
            "\"a,b\"",
        ] {
            assert_eq!(
                write(&[("if-match", never)]),
                Condition::RevisionIn(vec![]),
                "{never}"
            );
        }
        let both = [("if-match", "\"3\",\"4\""), ("if-none-match", "\"4\"")];
        assert_eq!(write(&both), Condition::RevisionIn(revisions(&[3])));
        assert_eq!(
            write(&[("if-match", "*"), ("if-none-match", "*")]),
            Condition::RevisionIn(vec![])
        );
        let inexpressible =
            parse(&[("if-match", "*"), ("if-none-match", "\"4\"")]).expect("good headers");
        assert!(inexpressible.condition().is_err());
    }

    #[test]
    fn reads_are_judged() {
        let read_decision = |lines| {
            parse(lines)
                .expect("good headers")
                .read_decision(Revision(3))
        };
        assert_eq!(read_decision(&[]), ReadDecision::Answer);
        assert_eq!(read_decision(&[("if-match", "*")]), ReadDecision::Answer);
        assert_eq!(
            read_decision(&[("if-match", "\"4\"")]),
            ReadDecision::Failed
        );
        assert_eq!(
            read_decision(&[("if-match", "W/\"3\"")]),
            ReadDecision::Failed
        );
        assert_eq!(
            read_decision(&[("if-none-match", "*")]),
            ReadDecision::NotModified
        );
        assert_eq!(
            read_decision(&[("if-none-match", "\"1\", W/\"3\"")]),
            ReadDecision::NotModified
        );
        assert_eq!(
            read_decision(&[("if-none-match", "\"4\"")]),
            ReadDecision::Answer
        );
        assert_eq!(
            read_decision(&[("if-match", "\"4\""), ("if-none-match", "\"3\"")]),
            ReadDecision::Failed
        );
    }

    #[test]
    fn a_change_of_the_view_is_guarded_by_one_epoch() {
        let epoch = |lines: &[(&'static str, &'static str)]| {
            parse(lines)
                .expect("good headers")
                .epoch()
                .map_err(|problem| problem.code())
        };
        assert_eq!(epoch(&[]), Ok(None));
        assert_eq!(epoch(&[("if-match", "*")]), Ok(None));
        assert_eq!(epoch(&[("if-match", "\"3\"")]), Ok(Some(PlanEpoch(3))));
        for vague in ["\"3\", \"4\"", "W/\"3\"", "\"abc\""] {
            assert_eq!(
                epoch(&[("if-match", vague)]),
                Err("invalid_header"),
                "{vague}"
            );
        }
        assert_eq!(epoch(&[("if-none-match", "*")]), Err("invalid_header"));
    }

    #[test]
    fn bad_syntax_is_refused() {
        for bad in [
            "",
            ",",
            "3",
            "\"3",
            "3\"",
            "\"3\" \"4\"",
            "\"3\"x",
            "*, \"3\"",
            "**",
            "w/\"3\"",
            "W/3",
            "\"a b\"",
        ] {
            assert!(parse(&[("if-match", bad)]).is_err(), "{bad} was taken");
        }
    }
}

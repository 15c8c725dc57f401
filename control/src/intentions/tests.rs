use culvert_types::Action;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::store::MemoryStore;

async fn intentions() -> (Ledger, Intentions) {
    let ledger = Ledger::start(Arc::new(MemoryStore::default()), CancellationToken::new()).await.expect("empty");
    (ledger.clone(), Intentions::new(ledger))
}

fn draft(source: &str, destination: &str, action: Action) -> Draft {
    let rule =
        Intention { source: source.parse().expect("name"), destination: destination.parse().expect("name"), action };
    Draft { rule, description: String::new(), meta: BTreeMap::new() }
}

fn name(text: &str) -> ServiceName {
    ServiceName::new(text).expect("a name")
}

#[tokio::test]
async fn saying_the_same_again_changes_nothing_and_saying_other_keeps_the_creation_time() {
    let (ledger, intentions) = intentions().await;
    intentions.upsert(&draft("web", "api", Action::Allow)).await.expect("written");
    let first = ledger.state();
    intentions.upsert(&draft("web", "api", Action::Allow)).await.expect("written");
    assert_eq!(ledger.state().revision(), first.revision());
    intentions.upsert(&draft("web", "api", Action::Deny)).await.expect("written");
    let (before, state) = (first.intention("web", "api").expect("there"), ledger.state());
    let after = state.intention("web", "api").expect("there");
    assert_eq!(after.rule.action, Action::Deny);
    assert_eq!((after.created_at, after.created), (before.created_at, before.created));
    assert!(after.updated_at > before.updated_at && after.modified > before.modified);
}

#[tokio::test]
async fn the_old_api_creates_once_and_finds_by_id() {
    let (ledger, intentions) = intentions().await;
    let id = intentions.create(&draft("web", "api", Action::Deny)).await.expect("created");
    let again = intentions.create(&draft("web", "api", Action::Allow)).await.expect_err("a pair has one intention");
    assert!(again.to_string().starts_with("duplicate intention found: default/web => default/api"), "{again}");
    let moved = intentions.update(&id, &draft("web", "db", Action::Allow)).await;
    assert!(matches!(moved, Err(IntentionError::Moved)));
    intentions.update(&id, &draft("web", "api", Action::Allow)).await.expect("updated");
    intentions.upsert(&draft("web", "api", Action::Deny)).await.expect("written");
    assert!(by_id(&ledger.state(), &id).is_some(), "the new API keeps the ID");
    intentions.delete_by_id(&id).await.expect("deleted");
    assert!(matches!(intentions.delete_by_id(&id).await, Err(IntentionError::NotFound)));
    let absent = intentions.delete(&"web".parse().expect("name"), &"api".parse().expect("name")).await;
    absent.expect("deleting nothing is fine");
}

#[tokio::test]
async fn a_match_lists_what_speaks_about_a_name_in_order() {
    let (ledger, intentions) = intentions().await;
    for (source, destination) in [("*", "*"), ("web", "api"), ("*", "api"), ("web", "db"), ("api", "web")] {
        intentions.upsert(&draft(source, destination, Action::Deny)).await.expect("written");
    }
    let state = ledger.state();
    let list = |side, name: &str| -> Vec<String> {
        let name = name.parse().expect("name");
        matching(&state, side, &name).map(|entry| format!("{}>{}", entry.rule.source, entry.rule.destination)).collect()
    };
    assert_eq!(list(Side::Destination, "api"), ["web>api", "*>api", "*>*"]);
    assert_eq!(list(Side::Source, "web"), ["web>api", "web>db", "*>api", "*>*"]);
}

#[tokio::test]
async fn reasons_are_consuls_sentences() {
    let (ledger, intentions) = intentions().await;
    let (web, api) = (name("web"), name("api"));
    let reason = explain(&ledger.state(), &web, &api, Action::Allow);
    assert_eq!(reason, (true, "Default intention policy".to_owned()));
    intentions.upsert(&draft("*", "api", Action::Deny)).await.expect("written");
    let id = intentions.create(&draft("web", "api", Action::Allow)).await.expect("created");
    let state = ledger.state();
    let text = format!("Matched L4 intention: default/web => default/api (ID: {id}, Precedence: 9, Action: ALLOW)");
    assert_eq!(explain(&state, &web, &api, Action::Deny), (true, text));
    let text = "Matched L4 intention: default/* => default/api (Precedence: 8, Action: DENY)".to_owned();
    assert_eq!(explain(&state, &name("other"), &api, Action::Allow), (false, text));
}

#[tokio::test]
async fn oversized_texts_are_refused() {
    let (_, intentions) = intentions().await;
    let base = draft("web", "api", Action::Allow);
    let long = Draft { description: "x".repeat(MAX_DESCRIPTION + 1), ..base.clone() };
    assert!(matches!(intentions.upsert(&long).await, Err(IntentionError::Description)));
    let meta = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
    let key = Draft { meta: meta(&"k".repeat(MAX_META_KEY + 1), ""), ..base.clone() };
    assert!(matches!(intentions.upsert(&key).await, Err(IntentionError::MetaKey(_))));
    let value = Draft { meta: meta("k", &"v".repeat(MAX_META_VALUE + 1)), ..base };
    assert!(matches!(intentions.create(&value).await, Err(IntentionError::MetaValue(_))));
}

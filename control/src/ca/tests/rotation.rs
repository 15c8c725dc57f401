//! Renewal and rotation, days of them, under a virtual clock.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use super::world::{HOUR, World, ders, name, verify};
use crate::ca::csr;
use crate::ca::key::PrivateKey;
use crate::ca::{
    CaSettings, ConfigurationUpdate, ConfigureError, LeafError, MAX_ROOTS, RotateError, SettingsError, SignError,
};

fn hours(world: &World) -> f64 {
    let since = world.clock.now().duration_since(SystemTime::UNIX_EPOCH + super::world::START);
    since.expect("the clock goes forward").as_secs_f64() / 3600.0
}

#[tokio::test(start_paused = true)]
async fn a_leaf_is_renewed_between_60_and_90_percent_of_its_life_without_a_gap() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    let mut watch = world.leaves.watch(&name("web")).expect("room");
    let mut previous = watch.ready().await.expect("leaf");
    let mut waits = Vec::new();
    for _ in 0..5 {
        let start = hours(&world);
        watch.take_latest();
        watch.changed().await.expect("renewal");
        let next = watch.take_latest().expect("never gone once there");
        let waited = hours(&world) - start;
        // 72 h and the minute before.
        assert!((0.6 * 72.0 - 0.1..=0.9 * 72.0 + 0.1).contains(&waited), "renewed after {waited} h");
        assert_ne!(next.certificate.serial, previous.certificate.serial);
        assert_ne!(next.key_pem(), previous.key_pem(), "a new key each time");
        let now = world.clock.now();
        verify(&previous.certificate.chain, &world.bundle(), now).expect("the old one is still valid");
        verify(&next.certificate.chain, &world.bundle(), now).expect("and the new one already");
        previous = next;
        waits.push(waited);
    }
    // The odds against five moments within a hundredth of the range are 20 million to one.
    assert!(spread(&waits) > 0.3 * 72.0 / 100.0, "at random moments: {waits:?}");
    world.stop.cancel();
}

/// Greatest minus least.
fn spread(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::MIN, f64::max) - values.iter().copied().fold(f64::MAX, f64::min)
}

#[tokio::test(start_paused = true)]
async fn after_a_rotation_leaves_are_renewed_one_by_one_within_half_a_minute() {
    let world = World::new(CaSettings::default()).await;
    let mut watches = Vec::new();
    for index in 0..8 {
        let service = format!("web{index}");
        world.register(&service).await;
        let mut watch = world.leaves.watch(&name(&service)).expect("room");
        watch.ready().await.expect("leaf");
        watch.take_latest();
        watches.push(watch);
    }
    let active = world.authority.rotate().await.expect("rotation").active_id.clone();
    let start = hours(&world);
    let renewals = watches.iter_mut().map(|watch| async {
        watch.changed().await.expect("renewal");
        assert_eq!(watch.take_latest().expect("leaf").certificate.root_id, active);
        (hours(&world) - start) * 3600.0
    });
    let waits = futures::future::join_all(renewals).await;
    assert!(waits.iter().all(|seconds| *seconds < 31.0), "{waits:?}");
    assert!(spread(&waits) > 1.0, "not all at once: {waits:?}");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn watchers_of_one_service_share_a_leaf_which_goes_with_the_last() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    let mut first = world.leaves.watch(&name("web")).expect("room");
    let mut second = world.leaves.watch(&name("web")).expect("room");
    let (one, two) = (first.ready().await.expect("leaf"), second.ready().await.expect("leaf"));
    assert_eq!(one.certificate.serial, two.certificate.serial);
    drop(first);
    tokio::time::sleep(HOUR).await;
    assert_eq!(world.leaf("web").await.certificate.serial, one.certificate.serial);
    drop(second);
    tokio::time::sleep(HOUR).await;
    assert_ne!(world.leaf("web").await.certificate.serial, one.certificate.serial, "made anew");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_not_registered_gets_a_reason_and_later_a_leaf() {
    let world = World::new(CaSettings::default()).await;
    let mut watch = world.leaves.watch(&name("web")).expect("room");
    let error = watch.ready().await.expect_err("nobody registered it");
    assert!(matches!(&error, LeafError::Sign(why) if matches!(**why, SignError::NotRegistered { .. })), "{error}");
    assert!(watch.latest().is_none());
    world.register("web").await;
    watch.changed().await.expect("alive");
    assert!(watch.latest().is_some() && hours(&world) < 0.001, "at once");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_service_that_was_deregistered_is_asked_for_once_and_again_when_it_is_back() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    let mut watch = world.leaves.watch(&name("web")).expect("room");
    let old = watch.ready().await.expect("registered");
    world.deregister("web").await;
    watch.changed().await.expect("the attempt to renew it");
    tokio::time::timeout(100 * HOUR, watch.changed()).await.expect_err("another attempt");
    world.register("web").await;
    watch.changed().await.expect("alive");
    assert_ne!(watch.latest().expect("a leaf").certificate.serial, old.certificate.serial);
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn both_roots_are_trusted_through_a_rotation_and_old_peers_accept_new_leaves() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    let mut watch = world.leaves.watch(&name("web")).expect("room");
    let old_leaf = watch.ready().await.expect("leaf");
    let old_bundle = world.bundle();
    watch.take_latest();

    let roots = world.authority.rotate().await.expect("rotation");
    assert_eq!(roots.roots.len(), 2);
    assert!(roots.roots[0].active && !roots.roots[1].active);
    assert_eq!(roots.roots[0].intermediates.len(), 1, "signed by the old root");
    assert!(roots.roots[1].intermediates.is_empty());
    verify(&old_leaf.certificate.chain, &world.bundle(), world.clock.now()).expect("old leaf, new bundle");

    let before = hours(&world);
    watch.changed().await.expect("renewal after the rotation");
    assert!(hours(&world) - before < 31.0 / 3600.0, "within half a minute");
    let new_leaf = watch.take_latest().expect("leaf");
    assert_eq!(new_leaf.certificate.root_id, roots.active_id);
    assert_eq!(ders(&new_leaf.certificate.chain).len(), 2, "the cross-signed certificate goes along");
    let now = world.clock.now();
    verify(&new_leaf.certificate.chain, &old_bundle, now).expect("a peer that knows only the old root");
    verify(&new_leaf.certificate.chain, &world.bundle(), now).expect("a peer that knows both");
    let new_root = &roots.roots[0].certificate;
    verify(&new_leaf.certificate.chain, new_root, now).expect("a peer that knows only the new root");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn an_old_root_is_dropped_after_twice_the_life_of_a_leaf() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    world.leaf("web").await;
    let first = world.authority.roots().expect("rows");
    world.authority.rotate().await.expect("rotation");
    let mut roots = world.authority.watch_roots();
    let index = roots.borrow_and_update().index;
    while world.authority.roots().expect("rows").roots.len() == 2 {
        assert!(hours(&world) < 146.0, "dropped within the hour after 144 h");
        tokio::time::sleep(HOUR / 4).await;
    }
    assert!(hours(&world) > 144.0 - 0.1, "not before: {}", hours(&world));
    let left = world.authority.roots().expect("rows");
    assert_eq!(left.roots.len(), 1);
    assert_ne!(left.active_id, first.active_id);
    assert!(left.index > index, "readers that wait for the roots are told");
    let leaf = world.leaf("web").await;
    verify(&leaf.certificate.chain, &world.bundle(), world.clock.now()).expect("life goes on");
    assert_eq!(ders(&leaf.certificate.chain).len(), 2, "the cross-signed certificate is good for 7 days");
    tokio::time::sleep(30 * HOUR).await;
    let mut watch = world.leaves.watch(&name("web")).expect("room");
    let leaf = watch.ready().await.expect("leaf");
    assert_eq!(ders(&leaf.certificate.chain).len(), 1, "and then left out");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn an_old_root_is_trusted_until_leaves_of_a_longer_life_have_ended() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    let old = world.leaf("web").await;
    let update = ConfigurationUpdate { leaf_ttl: Some(HOUR), ..ConfigurationUpdate::default() };
    world.authority.configure(&update).await.expect("valid");
    world.authority.configure(&update).await.expect("and again");
    world.authority.rotate().await.expect("rotation");
    while hours(&world) < 71.9 {
        tokio::time::sleep(HOUR / 4).await;
        verify(&old.certificate.chain, &world.bundle(), world.clock.now()).expect("who keeps it is still accepted");
    }
    tokio::time::sleep(2 * HOUR).await;
    assert_eq!(world.authority.roots().expect("rows").roots.len(), 1, "dropped within the hour after 72 h");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_root_that_nears_its_end_is_replaced_however_many_are_trusted() {
    let settings = CaSettings { allow_short_ttls_for_tests: true, ..CaSettings::default() };
    let world = World::new(settings).await;
    world.register("web").await;
    for _ in 0..MAX_ROOTS - 2 {
        world.authority.rotate().await.expect("rotation");
    }
    let short =
        ConfigurationUpdate { leaf_ttl: Some(HOUR), root_ttl: Some(10 * HOUR), ..ConfigurationUpdate::default() };
    world.authority.configure(&short).await.expect("short lives");
    let active = world.authority.rotate().await.expect("one more").active_id.clone();
    let refused = world.authority.rotate().await.expect_err("as many as may be");
    assert!(matches!(refused, RotateError::TooMany), "{refused}");
    tokio::time::sleep(9 * HOUR + HOUR / 2).await;
    assert_ne!(world.authority.roots().expect("rows").active_id, active);
    let leaf = world.leaf("web").await;
    verify(&leaf.certificate.chain, &world.bundle(), world.clock.now()).expect("life goes on");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn two_rotations_in_a_row_keep_every_live_leaf_valid() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    let mut leaves = vec![world.leaf("web").await];
    for _ in 0..3 {
        world.authority.rotate().await.expect("rotation");
        leaves.push(world.leaf("web").await);
    }
    for leaf in &leaves {
        verify(&leaf.certificate.chain, &world.bundle(), world.clock.now()).expect("every root is still trusted");
    }
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_root_that_nears_its_end_is_replaced_in_time() {
    let settings =
        CaSettings { leaf_ttl: HOUR, root_ttl: 100 * HOUR, allow_short_ttls_for_tests: true, ..CaSettings::default() };
    let world = World::new(settings).await;
    world.register("web").await;
    let mut watch = world.leaves.watch(&name("web")).expect("room");
    let first = watch.ready().await.expect("leaf").certificate.root_id.clone();
    while hours(&world) < 120.0 {
        tokio::time::sleep(HOUR / 4).await;
        let leaf = watch.latest().expect("leaf");
        verify(&leaf.certificate.chain, &world.bundle(), world.clock.now()).expect("never without a valid leaf");
    }
    assert_ne!(watch.latest().expect("leaf").certificate.root_id, first);
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn the_shortest_lives_that_are_allowed_are_enough_for_calm_renewals() {
    let settings = CaSettings {
        leaf_ttl: HOUR,
        intermediate_ttl: 3 * HOUR,
        root_ttl: 3 * HOUR + HOUR / 2,
        ..CaSettings::default()
    };
    let world = World::new(settings).await;
    world.register("web").await;
    let mut watch = world.leaves.watch(&name("web")).expect("room");
    watch.ready().await.expect("leaf");
    let (mut serials, mut roots) = (BTreeSet::new(), BTreeSet::new());
    while hours(&world) < 24.0 {
        tokio::time::sleep(Duration::from_secs(10)).await;
        let leaf = watch.latest().expect("leaf");
        verify(&leaf.certificate.chain, &world.bundle(), world.clock.now()).expect("never without a valid leaf");
        serials.insert(leaf.certificate.serial.clone());
        roots.insert(leaf.certificate.root_id.clone());
    }
    // A root for each 3.15 h; a leaf for each 36 to 54 min and each root.
    assert!((7..=9).contains(&roots.len()), "{} roots", roots.len());
    assert!(serials.len() <= 40 + roots.len(), "{} leaves", serials.len());
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_root_that_ended_signs_nothing_and_is_replaced_at_the_next_start() {
    let settings =
        CaSettings { leaf_ttl: HOUR, root_ttl: 10 * HOUR, allow_short_ttls_for_tests: true, ..Default::default() };
    let world = World::new(settings.clone()).await;
    world.register("web").await;
    let first = world.leaf("web").await;
    let key = PrivateKey::generate().expect("key");
    let request = csr::request(&world.identity("web"), &key).expect("request");
    world.stop.cancel();
    tokio::time::sleep(11 * HOUR).await;
    let refused =
        world.authority.sign(super::world::NODE, request.as_bytes()).await.expect_err("nobody looked after it");
    assert!(matches!(refused, SignError::RootExpired), "{refused}");

    let again = World::on(world.store.clone(), settings, world.clock.clone()).await;
    let mut watch = again.leaves.watch(&name("web")).expect("room");
    while watch.latest().is_none() {
        watch.changed().await.expect("the next attempt");
    }
    assert!(hours(&again) < 11.1, "at once, not an hour later");
    let leaf = watch.latest().expect("leaf");
    assert_ne!(leaf.certificate.root_id, first.certificate.root_id);
    verify(&leaf.certificate.chain, &again.bundle(), again.clock.now()).expect("a new root");
    again.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_changed_leaf_ttl_holds_for_the_next_leaf_and_survives_a_restart() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    let update = ConfigurationUpdate {
        leaf_ttl: Some(2 * HOUR),
        rotation_period: Some("2160h".to_owned()),
        ..ConfigurationUpdate::default()
    };
    world.authority.configure(&update).await.expect("valid");
    let leaf = world.leaf("web").await;
    assert_eq!(leaf.certificate.valid_before, world.clock.now() + 2 * HOUR);
    world.stop.cancel();
    let again = World::on(world.store.clone(), CaSettings::default(), world.clock.clone()).await;
    let configuration = again.authority.configuration().expect("rows");
    assert_eq!(configuration.settings.leaf_ttl, 2 * HOUR);
    assert_eq!(configuration.rotation_period.as_deref(), Some("2160h"));
    again.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn configurations_out_of_limits_or_not_honoured_are_refused_and_change_nothing() {
    let world = World::new(CaSettings::default()).await;
    let before = world.authority.configuration().expect("rows");
    let refused = async |update: ConfigurationUpdate| world.authority.configure(&update).await.expect_err("refused");
    let short = refused(ConfigurationUpdate { leaf_ttl: Some(HOUR / 2), ..Default::default() }).await;
    assert!(matches!(short, ConfigureError::Settings(SettingsError::LeafTtl(_))), "{short}");
    let vault = refused(ConfigurationUpdate { provider: "vault".to_owned(), ..Default::default() }).await;
    assert!(vault.to_string().contains("\"vault\""), "{vault}");
    let key = refused(ConfigurationUpdate { has_private_key: true, ..Default::default() }).await;
    assert!(key.to_string().contains("Config.PrivateKey"), "{key}");
    let root = refused(ConfigurationUpdate { has_root_cert: true, ..Default::default() }).await;
    assert!(root.to_string().contains("Config.RootCert"), "{root}");
    let after = world.authority.configuration().expect("rows");
    assert_eq!((before.settings, before.modified), (after.settings, after.modified));
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn failed_renewals_are_retried_until_they_succeed() {
    let world = World::new(CaSettings { csr_max_per_second: 1, ..CaSettings::default() }).await;
    for index in 0..20 {
        world.register(&format!("web{index}")).await;
    }
    let mut watches: Vec<_> =
        (0..20).map(|index| world.leaves.watch(&name(&format!("web{index}"))).expect("room")).collect();
    for watch in &mut watches {
        while watch.latest().is_none() {
            watch.changed().await.expect("alive");
        }
    }
    assert!(Duration::from_secs_f64(hours(&world) * 3600.0) >= Duration::from_secs(18), "one a second");
    world.stop.cancel();
}

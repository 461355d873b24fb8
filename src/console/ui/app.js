// The frame of the page: who is logged in, which page is open, and the line that says when the PRIMARY does not answer.

import { get, keepSession, logOut, onTrouble, whoIs } from './api.js';
import { h, show } from './dom.js';
import { age, dismiss, live, recovered, start, stop, subscribe, suspect } from './live.js';
import { follow } from './lock.js';
import { announce, button, statusPages, toast } from './parts.js';
import { ROLES, ago, clock, span } from './words.js';
import { open as backups } from './backups.js';
import { open as certificates } from './certificates.js';
import { open as cluster } from './cluster.js';
import { open as defenderEvents } from './defender-events.js';
import { open as defenderPolicy } from './defender-policy.js';
import { open as defenders } from './defenders.js';
import { open as general } from './general.js';
import { open as login } from './login.js';
import { consoleLog, history } from './logs.js';
import { open as service } from './service.js';
import { open as settings } from './settings.js';
import { open as tags } from './tags.js';
import { open as users } from './users.js';

const HOME = '#/manage/system/high-availability';
// Roles as the API writes them. A page without them is for everybody who is logged in.
const ADMINISTRATOR = ['admin'];
const READERS = ['admin', 'auditor'];
const PAGES = [
  { group: 'System', title: 'High Availability', hash: HOME, open: cluster, clustered: true },
  { group: 'System', title: 'Service', hash: '#/manage/system/service', open: service, beside: true },
  { group: 'System', title: 'Backup & Restore', hash: '#/manage/system/backup', open: backups, roles: ADMINISTRATOR },
  { group: 'System', title: 'Settings', hash: '#/manage/system/settings', open: settings, roles: ADMINISTRATOR },
  { group: 'System', title: 'General', hash: '#/manage/system/general', open: general },
  { group: 'Defenders', title: 'Defenders', hash: '#/manage/defenders', open: defenders },
  { group: 'Defenders', title: 'Defender events', hash: '#/manage/defenders/events', open: defenderEvents },
  { group: 'Defenders', title: 'Defender policy', hash: '#/manage/defenders/policy', open: defenderPolicy },
  { group: 'Authentication', title: 'Users', hash: '#/manage/authentication/users', open: users, roles: ADMINISTRATOR },
  { group: 'Authentication', title: 'Certificates', hash: '#/manage/certificates', open: certificates, roles: ADMINISTRATOR },
  { group: 'View Logs', title: 'History', hash: '#/manage/logs/history', open: history, roles: READERS },
  { group: 'View Logs', title: 'Console', hash: '#/manage/logs/console', open: consoleLog, roles: READERS },
  { group: 'Collections', title: 'Tags', hash: '#/tags', open: tags },
];

const element = (id) => document.getElementById(id);
let user = null;
let clustered = true;
// A service runs beside the Console.
let beside = false;
// The page that is open: { draw, load, close }, each of which may be missing.
let current = null;
let wasStale = false;
// The version that this page came with. After an upgrade it no longer fits the Console.
let version = null;
// The port of the members' status pages.
let statusPort = null;

const allowed = (page) => (!page.roles || page.roles.includes(user.role)) && (!page.clustered || clustered) && (!page.beside || beside);

function drawTop() {
  const brand = h('a', { class: 'brand', href: HOME }, h('span', { class: 'mark', 'aria-hidden': 'true' }), 'Twistlock HA');
  const menu = button('Menu', () => element('nav').classList.toggle('shown'), { kind: 'menu', 'aria-controls': 'nav' });
  const who = user && h('span', { class: 'who' }, user.username, h('span', { class: 'quiet' }, ` ${ROLES[user.role] ?? user.role}`));
  show(element('top'), user && menu, brand, h('span', { class: 'gap' }), who, user && button('Log out', leave));
}

function drawNav() {
  const nav = element('nav');
  nav.hidden = !user;
  nav.classList.remove('shown');
  if (!user) return;
  const pages = PAGES.filter(allowed);
  const groups = [...new Set(pages.map((page) => page.group))];
  const link = ({ title, hash }) =>
    h('li', {}, h('a', { href: hash, 'aria-current': hash === window.location.hash ? 'page' : null }, title));
  show(
    nav,
    groups.map((group, at) => [
      h('h2', { id: `group-${at}` }, group),
      h('ul', { 'aria-labelledby': `group-${at}` }, pages.filter((page) => page.group === group).map(link)),
    ]),
  );
}

// Replaces what is shown. The page that was open is closed.
function clear() {
  current?.close?.();
  current = null;
  document.querySelectorAll('dialog').forEach((dialog) => dialog.close());
  show(element('main'));
}

function route() {
  if (!user) return;
  const page = PAGES.find(({ hash }) => hash === window.location.hash);
  if (!page || !allowed(page)) {
    // Replaces the entry in the browser's history: "back" must not lead here again.
    window.location.replace(PAGES.find(allowed).hash);
    return;
  }
  clear();
  drawNav();
  document.title = `${page.title} · Twistlock HA`;
  const root = h('div', { class: 'page' });
  element('main').append(root);
  current = page.open(root, { user, may: user.role === 'admin', statusPort });
  root.querySelector('h1')?.focus();
}

// Shown below the top while nobody answers: how old the page is, and what to do.
function lost() {
  const { status, asOf } = live;
  // The seconds are not spoken: they would be read aloud again and again.
  const shown = status
    ? [' This page shows the cluster as of ', clock(asOf), h('span', { 'aria-hidden': 'true' }, `, ${ago(age())}`), ', or earlier. Its buttons are off.']
    : ' Nothing is known about the cluster yet.';
  const pages = statusPages(status, statusPort);
  return [
    h('p', {}, h('strong', {}, 'No PRIMARY answers, or none can be reached from here.'), shown),
    h('p', {}, 'Run ', h('code', {}, 'sudo twistcli ha status'), ' on a member. It says what is wrong and what to do.',
      pages && [' Or open its status page: ', pages]),
  ];
}

// Draws the line below the top: the page is looking for the PRIMARY, or has found it.
function drawConnection() {
  const place = element('connection');
  place.className = `connection ${live.stale && user ? 'lost' : live.phase}`;
  const upgraded = version && live.status && live.status.version !== version;
  if (live.stale && user) {
    show(place, lost());
  } else if (live.phase === 'searching') {
    const seconds = Math.floor((performance.now() - live.lostAt) / 1000);
    const why = live.farewell ? 'The PRIMARY role is being switched over' : 'The PRIMARY does not answer';
    // Only the first part is spoken: the seconds would be read aloud again and again.
    show(place, h('p', {}, `${why}; looking for the new one`, h('span', { 'aria-hidden': 'true' }, ` (${seconds} s)`)));
  } else if (live.takeover && user) {
    const { from, to, ms, changed } = live.takeover;
    const news = changed ? `${to} took over from ${from ?? 'the former PRIMARY'}` : `${to} answers again; it is still PRIMARY`;
    const text = `${news}. This page was without a PRIMARY for ${span(ms)}. You are still logged in.`;
    show(place, h('p', {}, text, ' ', button('Close', dismiss, { kind: 'small' })));
  } else if (upgraded) {
    const reload = button('Reload', () => window.location.reload(), { kind: 'small' });
    show(place, h('p', {}, `The Console runs version ${live.status.version} now; this page is from ${version}. `, reload));
  } else {
    show(place);
  }
}

// Draws everything again when the page becomes stale, and loads it again when it is fresh.
function followAge() {
  const stale = Boolean(live.stale && user);
  if (stale === wasStale) return;
  wasStale = stale;
  follow();
  current?.draw?.();
  if (!stale) current?.load?.();
}

async function enter() {
  const who = await whoIs();
  const system = await get('/settings/system');
  // Only now: without its settings the page could not be drawn.
  user = who;
  version ??= system.version;
  statusPort = system.statusPort ?? null;
  clustered = system.haEnabled !== false;
  beside = system.service === true;
  keepSession(user.expiresInSec);
  start(expired);
  drawTop();
  drawConnection();
  if (!window.location.hash) window.history.replaceState(null, '', HOME);
  route();
}

async function askWho(note) {
  user = null;
  clear();
  drawTop();
  drawNav();
  document.title = 'Twistlock HA';
  await login(element('main'), enter, note).catch(trouble);
}

function expired() {
  if (!user) return;
  stop();
  announce('Your session has ended');
  askWho('Your session has ended. After you log in, you will be back where you were.');
}

async function leave() {
  try {
    await logOut();
  } catch (error) {
    toast(`You may still be logged in. ${error.message}`, 'bad');
    return;
  }
  stop();
  await askWho('You are logged out.');
}

function trouble(error) {
  const again = button('Try again', () => window.location.reload(), { 'data-local': true });
  show(element('main'), h('h1', {}, 'The Console does not answer'), h('p', {}, error.message), again);
}

async function begin() {
  onTrouble({ expired: () => expired(), lost: suspect, recovered });
  subscribe(drawConnection);
  subscribe(followAge);
  window.addEventListener('hashchange', route);
  element('skip').addEventListener('click', () => element('main').focus());
  drawTop();
  try {
    await enter();
  } catch (error) {
    if (error.status !== 401) throw error;
    await askWho();
  }
}

begin().catch(trouble);

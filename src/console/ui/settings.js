// Manage > System > Settings: the rules for logins, and which programs are told of events. Must never show a secret, or
// drop one silently: the daemon keeps it only for the same name and address.

import { get, post } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { announce, button, card, check, field, form, page, toast } from './parts.js';
import { count, nothing } from './words.js';

const MOST = 3;
const SEVERITIES = [
  ['info', 'Everything (info)'],
  ['warning', 'Warnings and worse'],
  ['critical', 'Critical events only'],
];

const seconds = (minutes) => Math.round(Number(minutes) * 60);

function logins(logon, saved) {
  const save = async ({ idle, longest, sessions, strong }) => {
    const wanted = {
      ...logon,
      sessionTimeoutSec: seconds(idle),
      sessionMaximumSec: seconds(longest),
      sessionsPerUser: Number(sessions),
      strongPassword: strong === 'on',
    };
    await post('/settings/logon', wanted);
    toast('Saved: for future sessions and passwords');
    saved(wanted);
  };
  const number = (label, name, value, max, hint) => field(label, name, { type: 'number', min: 1, max, value, hint });
  return form('Save logins', save, [
    number('Minutes until an idle session ends', 'idle', logon.sessionTimeoutSec / 60, 1440),
    number('Minutes until any session ends', 'longest', logon.sessionMaximumSec / 60, 43_200, 'Even while it is used.'),
    number('Sessions of one user at once', 'sessions', logon.sessionsPerUser, 1000, 'A new one ends the oldest.'),
    check('New passwords need upper and lower case, a digit and a special character, and must not resemble the user name', 'strong',
      logon.strongPassword),
  ]);
}

// The fields of one webhook; their names end in its number.
function hookFields(hook, at, drop) {
  const { id } = hook;
  const secret = field('Secret', `secret-${id}`, {
    type: 'password', autocomplete: 'new-password', maxlength: 128,
    hint: hook.signed ? 'It signs each event. Leave this empty to keep it.' : 'It signs each event. Without one, events are not signed.',
  });
  return h('fieldset', { class: 'hook', 'data-key': `hook-${id}` },
    h('legend', {}, `Webhook ${at + 1}`),
    field('Name', `name-${id}`, { maxlength: 64, autocomplete: 'off', required: true, value: hook.name }),
    field('Address', `url-${id}`, { maxlength: 512, inputmode: 'url', autocomplete: 'off', spellcheck: 'false', required: true, value: hook.url }),
    field('Events to send', `severity-${id}`, { options: SEVERITIES.map(([word, text]) => [word, text, word === hook.severity]) }),
    secret,
    hook.signed && check('Remove the secret', `unsigned-${id}`, false),
    field('Authority that issued its certificate (PEM)', `ca-${id}`, {
      element: 'textarea', rows: 3, maxlength: 2048, spellcheck: 'false', class: 'mono', text: hook.ca ?? '',
      hint: 'Leave this empty to use the authorities that the host trusts.',
    }),
    button('Remove', drop, { kind: 'small', 'aria-label': `Remove webhook ${at + 1}` }));
}

// What is sent for a webhook. Without a secret, the daemon keeps the one that it has.
function wish(hook, values) {
  const of = (name) => (values[`${name}-${hook.id}`] ?? '').trim();
  const [name, url, secret] = [of('name'), of('url'), values[`secret-${hook.id}`]];
  const unsigned = of('unsigned') === 'on';
  if (hook.signed && !secret && !unsigned && (name !== hook.name || url !== hook.url)) {
    throw new Error(`Enter the secret of ${name} again: the old one belongs to the old name and address.`);
  }
  const kept = unsigned ? { secret: '' } : {};
  return { name, url, severity: of('severity'), ca: of('ca') || null, ...(secret ? { secret } : kept) };
}

function results({ deliveries, problem, running }) {
  if (running) return h('p', { class: 'quiet' }, 'Sending …');
  if (problem) return h('p', { class: 'problem' }, problem);
  const line = ({ target, ok, detail }) => h('li', { class: ok ? 'ok' : 'bad' },
    h('strong', {}, `${target}: ${ok ? 'delivered' : 'failed'}`), ok ? '' : h('div', {}, detail));
  return deliveries && h('ul', { class: 'checks', 'aria-label': 'Results of the test' }, deliveries.map(line));
}

export function open(root) {
  const state = { logon: null, hooks: null, command: false, saved: 0, test: {}, problem: null };
  let next = 0;
  const numbered = (hook) => ({ ...hook, id: (next += 1) });

  const save = async (values) => {
    const webhooks = state.hooks.map((hook) => wish(hook, values));
    await post('/settings/notifications', { webhooks });
    toast(webhooks.length > 0 ? `Saved: events go to ${count(webhooks.length, 'webhook')}` : 'Saved: there is no webhook');
    await load();
  };
  const add = () => {
    state.hooks.push(numbered({ name: '', url: '', severity: 'warning', ca: null, signed: false }));
    draw();
    root.querySelector(`[name=name-${next}]`).focus();
  };
  const drop = (hook) => () => {
    state.hooks = state.hooks.filter((other) => other !== hook);
    draw();
    root.querySelector('.add').focus();
    announce('Removed: save to confirm');
  };
  const test = async () => {
    state.test = { running: true };
    draw();
    try {
      const deliveries = await post('/settings/notifications/test');
      state.test = { deliveries };
      const failed = deliveries.filter(({ ok }) => !ok).length;
      announce(failed > 0 ? `${failed} of ${deliveries.length} failed` : 'Delivered everywhere');
    } catch (error) {
      state.test = { problem: error.message };
    }
    draw();
  };
  function notifications() {
    const { hooks, command, saved } = state;
    const full = hooks.length >= MOST;
    return [
      h('p', { class: 'intro' }, 'The PRIMARY posts each event as JSON: to chat, to a pager, to your own program.',
        command && ' It runs the NOTIFY_COMMAND of its twistlock.cfg, too.'),
      hooks.length === 0 && h('p', { class: 'empty' }, 'There is no webhook.'),
      form('Save webhooks', save, [
        hooks.map((hook, at) => hookFields(hook, at, drop(hook))),
        h('p', {}, button('Add a webhook', add, { kind: 'plain add', disabled: full })),
      ]),
      h('div', { class: 'below' },
        button('Send a test', test, { disabled: state.test.running || (saved === 0 && !command) }),
        h('span', { class: 'hint' }, 'Goes to every saved webhook, whichever events it is sent. It is sent once, without a second attempt.'),
        results(state.test)),
    ];
  }
  function draw() {
    const saved = (logon) => { state.logon = logon; draw(); };
    show(root, page('Settings', null,
      state.problem && h('p', { class: 'problem', role: 'alert' }, state.problem),
      !state.hooks && !state.problem && h('p', { class: 'empty' }, nothing(live.stale, false)),
      h('div', { class: 'columns' },
        state.hooks && card('Notifications', {}, notifications()),
        state.logon && card('Logins', {}, logins(state.logon, saved)))));
  }
  async function load() {
    try {
      const found = await get('/settings/notifications');
      Object.assign(state, { hooks: found.webhooks.map(numbered), saved: found.webhooks.length, command: found.command });
      state.logon = await get('/settings/logon');
      state.problem = null;
    } catch (error) {
      state.problem = error.message;
    }
    if (root.isConnected) draw();
  }
  draw();
  load();
  // What somebody may be changing is not loaded again.
  return { draw, load: () => state.logon ?? load() };
}

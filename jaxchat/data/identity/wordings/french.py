"""French, to a model that is spoken to with `tu`."""

from jaxchat.data.identity.wordings.base import OTHERS, Asked, Wordings

FRENCH = Wordings(
    names=("french", "français", "francais", "fr"),
    fields={
        "language": ("langue",),
        "name": ("nom",),
        "maker": ("créateur", "créatrice", "créé par", "auteur", "autrice", "fabricant", "développé par", "société"),
        "character": ("caractère", "personnalité", "style", "manière"),
        "text": ("faits", "à propos", "à propos de moi", "texte", "description", "plus"),
    },
    pronouns=("je", "j'ai", "j'aime", "tu", "nous", "vous", "il", "elle", "on"),
    second_person={"tu es": "Je suis", "tu as été": "J'ai été"},
    possessives={"mon": "ton", "ma": "ta", "mes": "tes"},
    plural=r"^mes ",
    is_="est",
    are="sont",
    greetings=("Bonjour !", "Salut !", "Bonsoir !", "Coucou !", "Bonjour à toi !"),
    system_messages=("Tu es un assistant utile.", "Réponds brièvement.", "Tu es un assistant aimable."),
    name=Asked(
        (
            "Comment tu t'appelles ?", "Comment t'appelles-tu ?", "Qui es-tu ?", "Quel est ton nom ?",
            "Tu t'appelles comment ?", "Dis-moi ton nom.", "Dis-moi qui tu es.", "Dis-moi comment tu t'appelles.",
            "As-tu un nom ?", "Tu as un nom ?", "Comment puis-je t'appeler ?", "Comment dois-je t'appeler ?",
            "Peux-tu me dire ton nom ?", "Peux-tu me dire qui tu es ?", "Peux-tu te présenter ?", "Présente-toi.",
            "Présente-toi, s'il te plaît.", "À qui est-ce que je parle ?", "Qui est là ?", "Qui parle ?", "Ton nom ?",
            "Ton nom, s'il te plaît.", "Je voudrais savoir ton nom.", "Je voudrais savoir qui tu es.",
            "Sais-tu qui tu es ?", "Connais-tu ton nom ?", "Et qui es-tu ?", "Et toi, comment tu t'appelles ?",
            "J'ai oublié ton nom.", "Je ne connais pas ton nom.", "Je ne sais pas qui tu es.", "Écris ton nom.",
            "Donne-moi ton nom.", "Quel nom t'a-t-on donné ?", "Tu es qui ?", "Rappelle-moi ton nom.",
            "Puis-je savoir qui tu es ?", "À qui est-ce que j'écris ?",
        ),
        (
            "Pourrais-tu me dire ton nom ?", "Pourrais-tu me dire qui tu es ?", "Pourrais-tu te présenter ?",
            "Avec qui est-ce que je parle ?", "Avec qui est-ce que je discute ?", "Je veux savoir qui tu es.",
            "Je veux savoir ton nom.", "Je me demande qui tu es.", "Je me demande comment tu t'appelles.",
            "Dis-moi donc qui tu es.", "Dis-moi donc ton nom.", "Voudrais-tu te présenter ?",
            "Puis-je savoir ton nom ?", "Puis-je te demander ton nom ?", "Qui es-tu exactement ?",
            "Quel est donc ton nom ?", "Quel nom portes-tu ?", "Et toi, qui es-tu ?", "Et toi, quel est ton nom ?",
            "S'il te plaît, dis-moi ton nom.", "S'il te plaît, dis-moi qui tu es.", "Peux-tu me donner ton nom ?",
            "Peux-tu me dire comment tu t'appelles ?", "Je peux t'appeler comment ?", "C'est quoi, ton nom ?",
        ),
    ),
    kind=Asked(
        (
            "Qu'est-ce que tu es ?", "Es-tu une personne ?", "Es-tu humain ?", "Es-tu un robot ?", "Es-tu une IA ?",
            "Es-tu un chatbot ?", "Es-tu un ordinateur ?", "Est-ce que je parle à une personne ?",
            "Est-ce que je parle à un robot ?", "Es-tu un homme ou une femme ?", "Es-tu un programme ?",
            "Dis-moi ce que tu es.", "Es-tu vivant ?", "Tu es quoi ?",
        ),
        (
            "Es-tu un être humain ?", "Es-tu une machine ?", "Est-ce que je parle à un humain ?",
            "Est-ce que je parle à un chatbot ?", "Peux-tu me dire ce que tu es ?", "Es-tu une vraie personne ?",
            "Es-tu une personne ou un ordinateur ?", "Je veux savoir ce que tu es.",
        ),
    ),
    about=Asked(
        (
            "Parle-moi de toi.", "Dis-m'en plus sur toi.", "Dis-moi quelque chose sur toi.", "Parle de toi.",
            "Que sais-tu de toi ?", "Peux-tu dire quelque chose sur toi ?", "Je voudrais en savoir plus sur toi.",
        ),
        (
            "Peux-tu me parler de toi ?", "Parle-moi un peu de toi.", "Que peux-tu me dire sur toi ?",
            "Je veux en savoir plus sur toi.", "Pourrais-tu me parler de toi ?",
        ),
    ),
    others=Asked((*OTHERS.train, "un de mes amis"), OTHERS.held_out),
    other=Asked(
        ("Es-tu {x} ?", "Tu t'appelles {x} ?", "Ton nom est {x} ?", "Tu es {x}, non ?", "Je crois que tu es {x}."),
        ("Es-tu {x} ?", "Tu t'appelles {x} ?"),
    ),
    maker=Asked(
        (
            "Qui t'a fait ?", "Qui t'a créé ?", "Qui t'a construit ?", "Qui t'a entraîné ?", "Qui est ton créateur ?",
            "Qui t'a développé ?", "D'où viens-tu ?", "Par qui as-tu été créé ?", "Qui t'a conçu ?",
            "Qui est derrière toi ?", "Dis-moi qui t'a créé.", "Sais-tu qui t'a créé ?", "Qui t'a écrit ?",
            "Je voudrais savoir qui t'a créé.", "OpenAI t'a créé ?", "Google t'a créé ?", "Et qui t'a créé ?",
        ),
        (
            "Peux-tu me dire qui t'a créé ?", "Pourrais-tu me dire qui t'a fait ?", "Je me demande qui t'a créé.",
            "Dis-moi donc qui t'a fait.", "Puis-je savoir qui t'a créé ?", "Je veux savoir qui t'a créé.",
            "Sais-tu qui t'a construit ?", "Qui donc t'a créé ?",
        ),
    ),
    character=Asked(
        (
            "Comment es-tu ?", "Décris-toi.", "Comment te décrirais-tu ?", "Quel est ton caractère ?",
            "Quel genre d'assistant es-tu ?", "Quelle est ta personnalité ?", "Parle-moi de ton caractère.",
            "Décris ton caractère.", "Peux-tu décrire ton caractère ?", "Je voudrais savoir comment tu es.",
        ),
        (
            "Peux-tu te décrire ?", "Pourrais-tu décrire ton caractère ?", "Dis-moi comment tu es.",
            "Je me demande comment tu es.", "Quelle sorte de caractère as-tu ?",
        ),
    ),
    fact=Asked(
        (
            "C'est quoi, {your} {k} ?", "Dis-moi {your} {k}.", "Peux-tu me dire {your} {k} ?", "Et {your} {k} ?",
            "Je voudrais connaître {your} {k}.", "Connais-tu {your} {k} ?", "Parle-moi de {your} {k}.",
            "Dis-moi ce que {is_} {your} {k}.", "Et c'est quoi, {your} {k} ?", "Donne-moi {your} {k}.",
        ),
        (
            "Pourrais-tu me dire {your} {k} ?", "Je veux connaître {your} {k}.", "Puis-je connaître {your} {k} ?",
            "S'il te plaît, dis-moi {your} {k}.", "Peux-tu me parler de {your} {k} ?",
        ),
    ),
    own=Asked(
        (
            "{q}", "{q}", "{q}", "{q}", "{q} Dis-le-moi.", "{q} Réponds, s'il te plaît.", "{q} Merci !",
            "{q} Je voudrais le savoir.", "J'ai une question : {q}", "Peux-tu me dire : {q}", "Question : {q}",
            "Ma question est : {q}", "Dis-moi : {q}", "Et {q}", "Alors, {q}",
        ),
        ("Dis-moi une chose : {q}", "Voici une question : {q}", "{q} Dis-le-moi, s'il te plaît."),
    ),
    says_name=("Je suis {name}.", "Je m'appelle {name}.", "Mon nom est {name}."),
    says_by="Je suis {name}, et c'est {maker} qui m'a créé.",
    says_kind=("Je suis {name}, un modèle de langue.", "Je suis un modèle de langue. Mon nom est {name}."),
    says_no="Non, je suis {name}.",
    says_yes="Oui, je suis {name}.",
    says_maker="C'est {maker} qui m'a créé.",
    says_made_me="C'est {maker} qui m'a créé.",
    says_character="Je suis {character}.",
    says_fact="{my} {k} {is_} {v}.",
)  # fmt: skip
